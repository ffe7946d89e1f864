"""What a job learns: the losses of objectives, hidden tokens, plug-ins whole and broken, what is refused."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.trainer import objective
from services.trainer.worker.objectives.masked import MaskedLm
from tests.house import ROOT, House, clone_store, house
from tests.plugins import install, plugin
from tests.trainer.kit import create, get, seal_dataset, small, stub_of, watch

GROUP = "qlorad.objectives"
BROKEN = '''
"""Objectives that go wrong."""
from dataclasses import dataclass
from services.trainer.worker.objectives import api


@dataclass(frozen=True)
class Breaks:
    """Breaks in the middle."""

    how: str = api.parameter("raise", help="in which way", choices=("raise", "shape", "constant"))

    def token_losses(self, logits, labels):
        if self.how == "shape":
            return logits
        if self.how == "constant":
            return logits.new_ones(len(labels))
        raise ZeroDivisionError("of its own")
'''


# Hidden tokens.


@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 9))
@settings(max_examples=60)
def test_hidden_tokens_are_those_of_seed_epoch_and_row(seed: int, epoch: int, row: int, length: int, off: int) -> None:
    ids = np.arange(10, 10 + length)
    mask = (np.arange(length) % 10 >= off).astype("uint8")
    it = MaskedLm()
    hidden = it.hide(ids, mask, 4, 1000, seed, epoch, row)
    again = it.hide(ids, mask, 4, 1000, seed, epoch, row)
    assert hidden.ids.tolist() == again.ids.tolist() and hidden.places.tolist() == again.places.tolist()
    assert it.places(mask, seed, epoch, row).tolist() == hidden.places.tolist(), "what is counted is what is hidden"
    assert set(hidden.places) <= set(np.flatnonzero(mask)) and bool(len(hidden.places)) == bool(mask.any())
    rest = np.delete(np.arange(length), hidden.places)
    assert (hidden.ids[rest] == ids[rest]).all()


def test_shares_of_hidden_tokens_are_those_asked_for() -> None:
    it, ids = MaskedLm(share=0.3, masked=0.5, swapped=0.3), np.arange(100, 100_100)
    hidden = it.hide(ids, np.ones(len(ids), "uint8"), 4, 50, 1, 0, 0)
    shown = hidden.ids[hidden.places]
    assert abs(len(hidden.places) / len(ids) - 0.3) < 0.01
    assert abs((shown == 4).mean() - 0.5) < 0.02
    assert abs((shown >= 100).mean() - 0.2) < 0.02, "the rest stays"
    other = it.hide(ids, np.ones(len(ids), "uint8"), 4, 50, 1, 1, 0)
    assert set(other.places) != set(hidden.places), "another epoch hides others"
    with pytest.raises(ValueError, match="at most 1"):
        MaskedLm(masked=0.9, swapped=0.2)


# Losses.


def batch_of(torch: Any) -> dict[str, Any]:
    ids = torch.randint(5, 2000, (2, 24), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore")
def test_an_objective_by_chunks_is_that_of_all_logits(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from services.trainer.worker import losses
    from services.trainer.worker.aim import Aim
    from services.trainer.worker.objectives.built_in import Completion, LabelSmoothing
    from tests.trainer.test_recipe import peft_model

    it = peft_model(home, "none", "fp32")
    batch = batch_of(torch)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 2048 * 7)  # seven tokens at a time

    class OtherCompletion(Completion):
        """The same loss by the way of a plug-in."""

    def gradients(loss: Any) -> tuple[float, Any]:
        it.model.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        return float(value), torch.cat([p.grad.flatten() for p in it.engine.parameters.values()])

    for chosen in (Completion(), OtherCompletion(), LabelSmoothing(), LabelSmoothing(smoothing=0.4)):
        aim = Aim(chosen, "it")
        short, slope = gradients(losses.Chunked(it.model, aim))
        plain, whole = gradients(losses.Plain(it.model, aim))
        assert short == pytest.approx(plain, rel=1e-5)
        assert float((slope - whole).norm() / whole.norm()) < 1e-4
    assert gradients(losses.Chunked(it.model, Aim(OtherCompletion(), "it")))[0] == pytest.approx(
        gradients(losses.Chunked(it.model))[0], rel=1e-5
    )
    logits = torch.randn(9, 30)
    labels = torch.randint(0, 30, (9,))
    smoothed = LabelSmoothing(smoothing=0.2).token_losses(logits, labels)
    spread = -(0.8 * logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] + 0.2 * logits.log_softmax(-1).mean(-1))
    assert torch.allclose(smoothed, spread, atol=1e-5)


def test_what_a_plugin_gives_is_looked_at() -> None:
    import torch

    from services.trainer.worker.aim import Aim, ObjectiveFailed
    from services.trainer.worker.train import error_of

    class Odd:
        def __init__(self, gives: Any) -> None:
            self.gives = gives

        def token_losses(self, logits: Any, labels: Any) -> Any:
            return self.gives(logits)

    logits, labels = torch.randn(4, 9, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    for gives, said in (
        (lambda x: x, r"gave \(4, 9\) for 4 tokens"),
        (lambda x: 3.0, "gave float for 4 tokens"),
        (lambda x: torch.ones(4), "do not depend on the logits"),
        (lambda x: 1 / 0, "failed with ZeroDivisionError"),
    ):
        with pytest.raises(ObjectiveFailed, match=said) as caught:
            Aim(Odd(gives), "the objective odd of odd-things 0.1").token_losses(logits, labels)
        error = error_of(caught.value)
        assert error.reason == "OBJECTIVE_FAILED" and "the objective odd of odd-things 0.1" in error.message


# What is refused, and what bends.


def wanted(name: str = "", **fields: bool) -> trainer_pb2.TrainSpec:
    train = trainer_pb2.TrainSpec()
    train.objective.name = name
    train.data.packing = fields.get("packing", False)
    train.parallelism.ranks = 2 if fields.get("ranks") else 1
    return train


def test_objective_model_and_batches_fit_one_another() -> None:
    schema = {"type": "object", "properties": {"smoothing": {"type": "number", "maximum": 1, "description": "x"}}}
    schemas = {"completion": {"properties": {}}, "label-smoothing": schema}

    def faults(train: trainer_pb2.TrainSpec, architecture: str, known: Any = None) -> dict[str, str]:
        return {v.field.removeprefix("spec.train."): v.accepted for v in objective.check(train, architecture, known)}

    assert faults(wanted("completion"), "LlamaForCausalLM") == {}
    assert "completion" in faults(wanted("masked-lm"), "LlamaForCausalLM")["objective.name"]
    assert faults(wanted("completion"), "BertForMaskedLM") == {"objective.name": "masked-lm"}
    assert set(faults(wanted("masked-lm", packing=True, ranks=True), "BertForMaskedLM")) == {
        "data.packing", "parallelism.ranks"
    }  # fmt: skip
    assert "did you mean 'label-smoothing'" in faults(wanted("label-smoothin"), "", schemas)["objective.name"]
    odd = wanted("label-smoothing")
    odd.objective.parameters.update({"smoothing": 2, "smooth": 1})
    assert set(faults(odd, "", schemas)) == {"objective.parameters.smoothing", "objective.parameters.smooth"}

    bert = wanted("completion", packing=True)
    objective.bend(bert, frozenset(), "BertForMaskedLM")
    assert bert.objective.name == "masked-lm" and not bert.data.packing
    said = wanted("completion", packing=True)
    objective.bend(said, frozenset({"spec.train.objective.name"}), "BertForMaskedLM")
    assert said.objective.name == "completion", "what was said is not bent"


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> Iterator[House]:
    """A trainer whose environment has plug-ins."""
    site = tmp_path_factory.mktemp("site")
    install(ROOT / "examples" / "plugin-objectives", site)
    install(plugin(tmp_path_factory.mktemp("b"), "broken-goals", BROKEN, GROUP, breaks="Breaks"), site)
    at = tmp_path_factory.mktemp("plugged") / "home"
    clone_store(starter_home, at)
    seal_dataset(at, "small", {"train": 12, "validation": 4})
    with house(at) as h:
        h.start("trainer", environ={"PYTHONPATH": str(site)})
        yield h


def test_objectives_are_listed_and_judged(plugged: House) -> None:
    stub = stub_of(plugged)
    listed = {o.name: o for o in stub.ListObjectives(trainer_pb2.ListObjectivesRequest(), timeout=60).objectives}
    assert list(listed) == sorted(listed) and set(listed) == {
        "breaks", "completion", "focal", "label-smoothing", "masked-lm"
    }  # fmt: skip
    assert listed["focal"].package == "qlorad-example-objectives 1.0.0"
    assert json.loads(listed["focal"].parameters_schema_json)["properties"]["gamma"]["maximum"] == 10
    asked = small()
    asked.train.objective.name = "focal"
    asked.train.objective.parameters.update({"gamma": 11, "beta": 1})
    with pytest.raises(grpc.RpcError) as caught:
        create(stub, asked, "wrong")
    assert "objective.parameters.gamma" in str(caught.value) and "objective.parameters.beta" in str(caught.value)
    good = small()
    good.train.objective.name = "label-smoothing"
    told = create(stub, good, "", validate_only=True).spec.train.objective
    assert told.parameters["smoothing"] == 0.1, "what was left out is told"


@pytest.mark.slow
def test_a_plugin_trains_and_one_that_breaks_fails_its_job_by_name(plugged: House) -> None:
    stub = stub_of(plugged)
    jobs = {}
    for name, parameters in (("focal", {"gamma": 1}), ("focal", {"gamma": 0}), ("completion", {}), ("breaks", {})):
        asked = small(4)
        asked.train.objective.name = name
        asked.train.objective.parameters.update(parameters)
        job = create(stub, asked, f"{name}-{len(jobs)}")
        jobs[len(jobs)] = [e.step.loss for e in watch(stub, job.name) if e.HasField("step")], get(stub, job.name)
    focal, flat, plain = (jobs[n][0] for n in range(3))
    assert flat == pytest.approx(plain, rel=1e-3), "without its power the focal loss is cross-entropy"
    assert all(a < b for a, b in zip(focal, plain, strict=True))
    broken = jobs[3][1]
    assert broken.state == trainer_pb2.JOB_STATE_FAILED and broken.error.reason == "OBJECTIVE_FAILED"
    assert "the objective breaks of broken-goals 0.1 failed with ZeroDivisionError: of its own" in broken.error.message
