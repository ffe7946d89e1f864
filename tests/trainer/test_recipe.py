"""The recipe's mathematics on the real stack: packing, accumulation, gradient flow, what an evaluation changes."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, trainer_pb2
from services.common import errors
from services.common.shelf import Shelf
from services.trainer.worker.batches import Plan, pack, pad, per_step_of
from tests.trainer.kit import MODEL

pytestmark = pytest.mark.filterwarnings("ignore")
RANK = 4


class Rows:
    """Rows as the ledger gives them."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        self._rows = [(np.array(i, "uint32"), np.array(m, "uint8")) for i, m in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, row: int) -> np.ndarray:
        return self._rows[row][0]

    def mask(self, row: int) -> np.ndarray:
        return self._rows[row][1]

    def lengths(self) -> np.ndarray:
        return np.array([len(i) for i, _ in self._rows])


def made_rows(count: int, seed: int) -> Rows:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(draw.integers(3, 40))
        rows.append((draw.integers(5, 2000, length).tolist(), [1, *draw.integers(0, 2, length - 2).tolist(), 1]))
    return Rows(rows)


def peft_model(
    home: pathlib.Path,
    method: str,
    compute: str,
    live_b: bool = True,
    checkpointed: bool = False,
    kind: int = trainer_pb2.OPTIMIZER_KIND_ADAMW,
    rslora: bool = False,
    momentum: float = 0.0,
    rank: int = RANK,
    fast: bool = True,
    targets: str = "q_proj v_proj down_proj",
    dropout: float = 0.0,
    dora: bool = False,
) -> types.SimpleNamespace:
    import torch

    from services.common.worker.load import load_base
    from services.trainer.worker import evaluation, lora, losses, step, tensors
    from services.trainer.worker.engines import Solo
    from services.trainer.worker.fast import install

    torch.set_num_threads(1)
    payload = Shelf(home / "store").open("models", MODEL.removeprefix("models/")).payload
    spec = trainer_pb2.TrainSpec()
    spec.lora.rank, spec.lora.alpha, spec.lora.rslora, spec.lora.dropout = rank, 8, rslora, dropout
    spec.lora.dora = dora
    spec.lora.target_modules.names.extend(targets.split())
    spec.optimizer.learning_rate, spec.optimizer.beta1, spec.optimizer.beta2 = 1e-2, 0.9, 0.999
    spec.data.packing, spec.data.micro_batch_tokens = True, 128
    spec.optimizer.momentum = momentum if kind == trainer_pb2.OPTIMIZER_KIND_SGD else 0.0
    spec.optimizer.kind, spec.memory.gradient_checkpointing = kind, checkpointed
    base = load_base(payload, method, True, compute, "cpu")
    torch.manual_seed(1)
    model = lora.with_lora(base, spec)
    assert not fast or install.install(model, spec) == ""
    if live_b:  # a fresh B is zero, which hides A's gradient
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, 0.05)
                elif dora and "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    model.train()
    loss, why = losses.of(model)
    assert why == "" and type(loss) is losses.Chunked
    return types.SimpleNamespace(
        step=step,
        tensors=tensors,
        evaluation=evaluation,
        torch=torch,
        model=model,
        spec=spec,
        engine=Solo(model, spec),
        loss=loss,
        plain=losses.Plain(model),
    )


def gradients(it: types.SimpleNamespace, batches: list[dict], trained: int) -> dict:
    it.engine.forget()
    for batch in batches:
        it.engine.backward(it.loss(batch), trained)
    return {n: p.grad.clone() for n, p in it.engine.parameters.items()}


def farthest(it: types.SimpleNamespace, left: dict, right: dict) -> float:
    """The largest relative distance between two sets of gradients."""
    assert left.keys() == right.keys() and len(left) == 2 * 3 * 2
    return max(float((left[n] - right[n]).norm() / left[n].norm().clamp_min(1e-12)) for n in left)


def test_p26_packed_padded_and_accumulated_give_one_gradient(starter_home: pathlib.Path) -> None:
    it = peft_model(starter_home, "none", "fp32")
    rows = made_rows(6, seed=3)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(6))
    one = gradients(it, [it.tensors.packed(rows, range(6), "cpu")], trained)
    alone = gradients(it, [it.tensors.packed(rows, [n], "cpu") for n in range(6)], trained)
    under = gradients(it, [it.tensors.padded(rows, range(6), "cpu")], trained)
    halves = gradients(it, [it.tensors.padded(rows, part, "cpu") for part in ([0, 1], [2, 3, 4, 5])], trained)
    assert farthest(it, alone, one) < 1e-4
    assert farthest(it, alone, under) < 1e-4
    assert farthest(it, alone, halves) < 1e-4


@pytest.mark.parametrize(("method", "compute"), [("none", "fp32"), ("nf4", "bf16")])
def test_checkpointing_keeps_less_and_gives_the_same_gradient(
    starter_home: pathlib.Path, method: str, compute: str
) -> None:
    rows = made_rows(5, seed=8)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(5))
    found, kept = [], []
    for checkpointed in (False, True):
        it = peft_model(starter_home, method, compute, checkpointed=checkpointed)
        frozen = {p.data_ptr() for p in it.model.parameters()}
        held: dict[int, int] = {}

        def keep(t, frozen: set[int] = frozen, held: dict[int, int] = held):
            if t.data_ptr() not in frozen:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        it.engine.forget()
        with it.torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = it.loss(it.tensors.packed(rows, range(5), "cpu"))
        kept.append(sum(held.values()))
        it.engine.backward(loss, trained)
        found.append({n: p.grad.clone() for n, p in it.engine.parameters.items()})
    assert all(it.torch.equal(found[0][n], found[1][n]) for n in found[0]), "to the bit"
    assert kept[1] < kept[0], kept


def test_the_gradient_through_int8_is_near_that_of_the_whole_weights(starter_home: pathlib.Path) -> None:
    from services.common.worker.load import weight_bytes

    rows = made_rows(5, seed=8)
    whole, eighth = (peft_model(starter_home, method, "bf16") for method in ("none", "int8"))
    batch = whole.tensors.packed(rows, range(5), "cpu")
    left, right = gradients(whole, [batch], 50), gradients(eighth, [batch], 50)
    for name in left:
        near = whole.torch.nn.functional.cosine_similarity(left[name].flatten(), right[name].flatten(), dim=0)
        assert float(near) > 0.98, (name, float(near))
    assert weight_bytes(eighth.model) < 0.75 * weight_bytes(whole.model)


def test_a_rank_stabilised_update_is_larger_by_the_root_of_the_rank(starter_home: pathlib.Path) -> None:
    rows = made_rows(3, seed=5)
    plain = peft_model(starter_home, "none", "fp32")
    other = peft_model(starter_home, "none", "fp32", rslora=True)
    assert math.isclose(scale(other) / scale(plain), math.sqrt(RANK))
    batch = plain.tensors.packed(rows, range(3), "cpu")
    assert float(plain.loss(batch)) != float(other.loss(batch))


def scale(it: types.SimpleNamespace) -> float:
    (found,) = {m.scaling["default"] for m in it.model.modules() if hasattr(m, "lora_A")}
    return float(found)


def test_plain_descent_moves_against_the_gradient(starter_home: pathlib.Path) -> None:
    it = peft_model(starter_home, "none", "fp32", kind=trainer_pb2.OPTIMIZER_KIND_SGD)
    rows = made_rows(4, seed=9)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(4))
    before = {n: p.detach().clone() for n, p in it.engine.parameters.items()}
    gradient = gradients(it, [it.tensors.packed(rows, range(4), "cpu")], trained)
    it.engine.step(0.5)
    for name, p in it.engine.parameters.items():
        it.torch.testing.assert_close(p.detach(), before[name] - 0.5 * gradient[name])
    assert not it.engine.optimizer.state or all(not s for s in it.engine.optimizer.state.values())


EIGHT_BITS = (trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT, trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW_8BIT)


@pytest.mark.parametrize(
    ("kind", "dora"),
    [*((n, False) for n in trainer_pb2.OptimizerKind.values() if n), (trainer_pb2.OPTIMIZER_KIND_ADAMW, True)],
)
def test_an_optimiser_goes_on_from_a_checkpoint_as_if_it_had_not_been_cut(
    starter_home: pathlib.Path, tmp_path: pathlib.Path, kind: int, dora: bool
) -> None:
    from services.trainer.worker import checkpoint

    rows = made_rows(4, seed=11)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(4))
    it, other = (
        peft_model(starter_home, "none", "fp32", kind=kind, momentum=0.9, rank=64, dora=dora) for _ in range(2)
    )

    def step(one: types.SimpleNamespace) -> None:
        gradients(one, [one.tensors.packed(rows, range(4), "cpu")], trained)
        one.engine.step(0.1)

    step(it)
    about = checkpoint.About(it.spec.lora, {}, artifacts_pb2.Lineage())
    checkpoint.write(tmp_path, checkpoint.Progress("j", step=1), it.engine, checkpoint.get_rng("cpu"), about)
    assert checkpoint.read(tmp_path, "j", other.engine).step == 1
    for _ in range(3):
        step(it), step(other)
    for name, p in it.engine.parameters.items():
        assert it.torch.equal(p, other.engine.parameters[name])
        if kind in EIGHT_BITS:  # else the test would be of something else
            assert it.engine.optimizer.state[p]["state1"].dtype == it.torch.uint8


@pytest.mark.parametrize(("method", "compute", "near"), [("none", "fp32", 1e-5), ("nf4", "bf16", 2e-2)])
def test_the_loss_by_chunks_is_the_loss_of_all_logits(
    starter_home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, method: str, compute: str, near: float
) -> None:
    from services.trainer.worker import losses

    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 2048 * 7)  # seven tokens
    it = peft_model(starter_home, method, compute)
    rows = made_rows(6, seed=12)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(6))
    for lay in (it.tensors.packed, it.tensors.padded):
        batch = lay(rows, range(6), "cpu")
        short = gradients(it, [batch], trained)
        value = float(it.loss(batch))
        it.loss, chunked = it.plain, it.loss
        assert math.isclose(float(it.loss(batch)), value, rel_tol=near / 10)
        assert farthest(it, gradients(it, [batch], trained), short) < near
        it.loss = chunked
    with it.torch.no_grad():
        assert math.isclose(float(it.loss(batch)), value, rel_tol=1e-6), "also where nothing is learnt"


def test_a_model_that_caps_its_logits_keeps_its_own_way(starter_home: pathlib.Path) -> None:
    from services.trainer.worker import losses

    it = peft_model(starter_home, "none", "fp32")
    base = it.model.get_base_model()
    forward = base.forward

    def capped(*args: object, **kwargs: object) -> object:
        told = forward(*args, **kwargs)
        told.logits = 2 * it.torch.tanh(told.logits / 2)
        return told

    base.forward = capped
    loss, why = losses.of(it.model)
    assert type(loss) is losses.Plain and "more to its logits" in why


def test_a_leak_between_packed_rows_would_be_seen(starter_home: pathlib.Path) -> None:
    it = peft_model(starter_home, "none", "fp32")
    rows = made_rows(3, seed=4)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(3))
    alone = gradients(it, [it.tensors.packed(rows, [n], "cpu") for n in range(3)], trained)
    leaky = it.tensors.packed(rows, range(3), "cpu")
    leaky["position_ids"] = it.torch.arange(leaky["input_ids"].shape[1])[None]
    assert farthest(it, alone, gradients(it, [leaky], trained)) > 0.05


def test_what_a_batch_holds_is_the_rows_and_nothing_else() -> None:
    """P27 in small: read back from the tensors that the model is given, packed and padded."""
    from services.common.prompt import tally
    from services.trainer.worker import checkpoint, tensors
    from services.trainer.worker import step as steps
    from services.trainer.worker.train import error_of

    rows, numbers = made_rows(9, seed=4), [4, 0, 7, 2]
    expected = functools.reduce(tally.plus, (tally.row_number(rows.ids(n), rows.mask(n).tobytes()) for n in numbers))
    for lay in (tensors.packed, tensors.padded):
        assert tensors.fed(lay(rows, numbers, "cpu")) == expected
        assert tensors.fed(lay(rows, numbers[:2], "cpu")) != expected
        for name, change in (("input_ids", 1), ("labels", 1)):
            batch = lay(rows, numbers, "cpu")
            batch[name][0, 2] += change
            assert tensors.fed(batch) != expected, "one token was another"
        batch = lay(rows, numbers, "cpu")
        there = (batch["labels"] != -100).nonzero()[0]
        batch["labels"][there[0], there[1]] = -100
        assert tensors.fed(batch) != expected, "one token was not trained"

    counts = types.SimpleNamespace(rows=4, tokens=70, trained_tokens=30)
    number = tally.text_of(expected)
    consumed = checkpoint.Progress("j", epoch_tokens=70, epoch_trained=30, epoch_rows=number)
    assert steps.check_epoch(0, consumed, counts, number).startswith("epoch 1 consumed what the ledger says: 4 rows")
    for planted in ({"epoch_tokens": 71}, {"epoch_trained": 29}, {"epoch_rows": tally.text_of(expected ^ 1)}):
        with pytest.raises(steps.NotTheLedger) as caught:
            steps.check_epoch(0, dataclasses.replace(consumed, **planted), counts, number)
        error = error_of(caught.value)
        assert error.reason == "NOT_THE_LEDGER" and "epoch 1 consumed" in error.message
    before = dataclasses.replace(consumed, epoch_rows="")  # of a checkpoint that did not count yet
    assert "not told" in steps.check_epoch(0, before, counts, number)


def test_the_rows_of_an_epoch_add_up_over_steps_and_begin_anew() -> None:
    from services.common.prompt import tally
    from services.trainer.worker import checkpoint
    from services.trainer.worker import step as steps
    from services.trainer.worker.batches import Step

    progress = checkpoint.Progress("j")
    for number, (index, rows) in enumerate([(0, 5), (1, 6), (2, 7), (0, 9)], start=1):
        done = steps.Done(1.0, 1.0, 1.0, 1.0, 10, 4, 4, rows)
        progress = steps.after_step(progress, Step(number, 0, index, 3, ()), done)
        assert progress.epoch_rows == tally.text_of([5, 11, 18, 9][number - 1])
    unknown = steps.after_step(
        checkpoint.Progress("j", 1, 0.0, 10, 4), Step(2, 0, 1, 3, ()), steps.Done(1.0, 1.0, 1.0, 1.0, 10, 4, 4, 6)
    )
    assert unknown.epoch_rows == "" and unknown.epoch_tokens == 20


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_gradient_flow_through_a_quantised_base(starter_home: pathlib.Path, method: str) -> None:
    """After two steps every A and every B moved, and every byte of the base is where it was."""
    it = peft_model(starter_home, method, "bf16", live_b=False)

    def raw() -> dict:
        # As bytes: nf4 codes lie in bf16 storage, where some of them read as NaN.
        return {n: p.detach().contiguous().view(it.torch.uint8).clone() for n, p in it.model.named_parameters()}

    before = raw()
    rows = made_rows(4, seed=5)
    batch = it.tensors.packed(rows, range(4), "cpu")
    for step in (1, 2):
        grads = gradients(it, [batch], 50)
        assert all(bool(g.any()) for n, g in grads.items() if ".lora_B." in n)
        assert all(bool(g.any()) == (step == 2) for n, g in grads.items() if ".lora_A." in n)
        it.engine.step(1e-2)
    moved = {n for n, now in raw().items() if not it.torch.equal(now, before[n])}
    assert moved == set(it.engine.parameters) and len(before) > len(moved)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_evaluation_changes_no_later_gradient(
    starter_home: pathlib.Path, tmp_path: pathlib.Path, method: str
) -> None:
    from services.trainer.worker.facts import Teller

    it = peft_model(starter_home, method, "bf16")
    rows = made_rows(4, seed=6)
    batch = it.tensors.packed(rows, range(4), "cpu")
    random = it.torch.get_rng_state()
    first = gradients(it, [batch], 50)
    it.evaluation.evaluate(it.model, it.loss, made_rows(8, seed=9), 1, it.spec, "cpu", it.engine, Teller(tmp_path))
    second = gradients(it, [batch], 50)
    assert it.model.training and it.torch.equal(random, it.torch.get_rng_state())
    assert all(it.torch.equal(first[n], second[n]) for n in first)


def test_a_loss_that_is_no_number_stops_the_job_naming_the_step(
    starter_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from services.trainer.worker import checkpoint
    from services.trainer.worker.batches import Step
    from services.trainer.worker.facts import Teller
    from services.trainer.worker.train import error_of

    it = peft_model(starter_home, "none", "fp32")
    with it.torch.no_grad():
        next(iter(it.engine.parameters.values())).fill_(float("nan"))
    step = Step(7, 0, 0, 1, ((0, 1),))
    with pytest.raises(it.step.NotFinite) as caught:
        progress = checkpoint.Progress("j", step=6)
        it.step.one_step(it.engine, it.loss, made_rows(2, 1), step, 9, it.spec, "cpu", Teller(tmp_path), progress)
    error = error_of(caught.value)
    assert error.reason == "NOT_FINITE" and "step 7" in error.message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "OUT_OF_MEMORY"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OUT_OF_MEMORY"),
        (OSError(28, "No space left on device"), "DISK_FULL"),
        (errors.rejected("x", "y"), "REJECTED"),
        (errors.invalid_field("made.jsonl:3", 99, "at most 8"), "BAD_DATA"),
        (ZeroDivisionError("token=qlt_verysecretthing"), "INTERNAL"),
    ],
)
def test_every_error_of_a_worker_has_its_word(error: Exception, reason: str) -> None:
    from services.trainer.worker.train import error_of

    told = error_of(error)
    assert told.reason == reason and "verysecret" not in told.message


LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@given(LENGTHS, st.integers(64, 200), st.integers(0, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_row_is_consumed_once_an_epoch_and_fits(
    lengths: list[int], room: int, seed: int, per_step: int, packing: bool, grouped: bool
) -> None:
    plan = Plan(lengths, seed, packing, room, per_step, 0, 2.0, grouped)
    total = plan.total_steps()
    steps = list(plan.steps(total))
    assert [s.number for s in steps] == list(range(1, total + 1))
    for epoch in (0, 1):
        rows = [r for s in steps if s.epoch == epoch for batch in s.micro_batches for r in batch]
        assert sorted(rows) == list(range(len(lengths)))
    for step in steps:
        assert 1 <= len(step.micro_batches) <= per_step
        for batch in step.micro_batches:
            sizes = [lengths[r] for r in batch]
            assert (sum(sizes) if packing else max(sizes) * len(sizes)) <= room
    assert 0 < plan.efficiency() <= 1
    for after in {0, total // 2, total - 1}:
        assert list(plan.steps(total, after)) == steps[after:], "a resumed run sees the same steps"


def test_best_fit_fills_bins() -> None:
    assert pack(range(4), [60, 50, 40, 30], 100) == [(0, 2), (1, 3)]
    assert pad(range(4), [10, 10, 30, 10], 60) == [(0, 1), (2, 3)]


def test_rows_of_like_length_waste_less_and_meet_others_in_the_next_epoch() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 2000).clip(8, 512).astype(int).tolist()
    plain, grouped = (Plan(lengths, 1, False, 2048, 1, 0, 2.0, on) for on in (False, True))
    assert plain.efficiency() < 0.55 and grouped.efficiency() > 0.9
    assert len(grouped.epoch(0)) < 0.6 * len(plain.epoch(0))
    assert grouped.epoch(0) == Plan(lengths, 1, False, 2048, 1, 0, 2.0, True).epoch(0)
    met = [{frozenset((a, b)) for rows in grouped.epoch(n) for a in rows for b in rows if a < b} for n in (0, 1)]
    assert len(met[0] & met[1]) < 0.4 * len(met[0])
    widths = [max(lengths[r] for r in rows) for rows in grouped.epoch(0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True), "short and long ones in turn"


@given(LENGTHS, st.integers(64, 200), st.integers(1, 600), st.integers(1, 3), st.booleans(), st.integers(0, 20))
def test_a_step_has_at_least_the_tokens_that_were_asked_for(
    lengths: list[int], room: int, tokens: int, ranks: int, packing: bool, max_steps: int
) -> None:
    def poorest(per_step: int) -> int:
        """Tokens of the poorest step that is not the last of its epoch."""
        plan = Plan(lengths, 3, packing, room, per_step, max_steps, 3.0)
        whole = [s for s in plan.steps(plan.total_steps()) if s.index + 1 < s.of]
        return min((sum(lengths[r] for rows in s.micro_batches for r in rows) for s in whole), default=1 << 30)

    found, enough = per_step_of(Plan(lengths, 3, packing, room, 0, max_steps, 3.0), tokens, ranks)
    assert found % ranks == 0 and enough == (sum(lengths) >= tokens)
    assert poorest(found) >= tokens
    if enough and found > ranks:
        assert poorest(found - ranks) < tokens, "no more micro-batches than that takes"
