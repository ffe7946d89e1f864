"""The trainer's own forward and backward against peft's and transformers', in numbers and in what is kept."""

from __future__ import annotations

import pathlib
import types

import pytest

from tests.trainer.test_recipe import gradients, made_rows, peft_model

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


def batches(it: types.SimpleNamespace) -> tuple[list, int]:
    rows = made_rows(6, seed=21)
    trained = sum(int(rows.mask(n)[1:].sum()) for n in range(6))
    return [it.tensors.packed(rows, range(4), "cpu"), it.tensors.padded(rows, [4, 5], "cpu")], trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [ALL, "q_proj v_proj", "o_proj down_proj"])
@pytest.mark.parametrize(("method", "compute", "near"), [("none", "fp32", 1e-5), ("nf4", "fp32", 1e-5)])
def test_the_gradient_is_that_of_peft(
    starter_home: pathlib.Path, targets: str, method: str, compute: str, near: float, dora: bool
) -> None:
    ours, theirs = (
        peft_model(starter_home, method, compute, fast=f, targets=targets, dora=dora) for f in (True, False)
    )
    assert any("magnitude" in n for n in ours.engine.parameters) == dora
    given, trained = batches(ours)
    left, right = (gradients(it, given, trained) for it in (ours, theirs))
    assert left.keys() == right.keys() and len(left) >= 8
    for name in left:
        assert left[name].dtype == ours.torch.float32
        assert float((left[name] - right[name]).norm() / right[name].norm()) < near, name


@pytest.mark.parametrize("dora", [False, True])
def test_in_bf16_it_is_as_near_to_the_truth_as_peft(starter_home: pathlib.Path, dora: bool) -> None:
    """The truth: the same NF4 weights, computed in fp32."""
    truth = peft_model(starter_home, "nf4", "fp32", fast=False, targets=ALL, dora=dora)
    given, trained = batches(truth)
    real = gradients(truth, given, trained)
    off = []
    for fast in (True, False):
        found = gradients(peft_model(starter_home, "nf4", "bf16", fast=fast, targets=ALL, dora=dora), given, trained)
        off.append(sum(float((found[n] - real[n]).norm() / real[n].norm()) for n in real) / len(real))
    assert off[0] < 1.25 * off[1] < 0.2, off


@pytest.mark.parametrize("fault", ["scale", "span"])
def test_a_planted_fault_would_be_seen(starter_home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from services.trainer.worker.fast import attention, install, linears

    ours, theirs = (peft_model(starter_home, "none", "fp32", fast=f, targets=ALL) for f in (False, False))
    if fault == "scale":
        plain = linears._dropped
        monkeypatch.setattr(linears, "_dropped", lambda x, keep, linear: plain(x, keep, linear) * 1.01)
    else:
        monkeypatch.setattr(attention, "spans_of", lambda positions, rows, length: [(0, rows * length)])
    why = install.install(ours.model, ours.spec)
    if fault == "scale":  # the branch alone: the probe sees it where B is not zero
        given, trained = batches(ours)
        left, right = (gradients(it, given, trained) for it in (ours, theirs))
        assert max(float((left[n] - right[n]).norm() / right[n].norm()) for n in left) > 1e-3
    else:
        assert "a probe gave something else" in why
        monkeypatch.undo()
        given, trained = batches(ours)
        left, right = (gradients(it, given, trained) for it in (ours, theirs))
        assert all(ours.torch.equal(left[n], right[n]) for n in left), "left as it was"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_is_drawn_once_and_used_twice(starter_home: pathlib.Path, checkpointed: bool) -> None:
    """With the same seed the slope of the loss is what small steps of the weights show, also where it is made again."""
    it = peft_model(starter_home, "none", "fp32", targets=ALL, checkpointed=checkpointed, dropout=0.3)
    (batch, _), trained = batches(it)
    torch = it.torch

    def loss() -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(it.loss(batch)) / trained

    torch.manual_seed(5)
    slope = gradients(it, [batch], trained)
    way = {n: g / sum(float(x.square().sum()) for x in slope.values()) ** 0.5 for n, g in slope.items()}
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in it.engine.parameters.items():
                p.add_(way[n], alpha=sign * 1e-2 * (2 if sign < 0 else 1))
        found.append(loss())
    shown = (found[0] - found[1]) / 2e-2
    assert shown == pytest.approx(sum(float((slope[n] * way[n]).sum()) for n in way), rel=0.02)
    it.model.eval()
    assert loss() == loss() and it.model.eval() is it.model


def test_dora_with_dropout_is_what_peft_makes_of_the_same_draw() -> None:
    """Small steps do not show it: what W + BA is large counts as fixed in the backward pass."""
    import peft
    import torch

    from services.trainer.worker.fast import linears

    class Drawn(torch.nn.Dropout):
        """Peft's dropout, with the numbers that this room draws."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            keep = torch.rand(x.shape) >= self.p
            return x * keep / (1 - self.p)

    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_dropout=0.4, target_modules=["0"], use_dora=True)
    wrapped = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(24, 40)), config).get_base_model()[0]
    trained = [
        wrapped.lora_A.default.weight,
        wrapped.lora_B.default.weight,
        wrapped.lora_magnitude_vector.default.weight,
    ]
    with torch.no_grad():
        trained[1].normal_(0, 0.3)
        trained[2].mul_(1 + torch.rand(40))
    wrapped.lora_dropout["default"] = Drawn(0.4)
    one = linears.of(wrapped)
    assert one is not None and one.dropout == 0.4
    x, pull = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 40)
    wrapped.train()
    theirs = wrapped(x)
    torch.manual_seed(3)
    (ours,) = linears.apply((one,), x, True)
    torch.testing.assert_close(ours, theirs)
    for left, right in zip(*(torch.autograd.grad(y, (x, *trained), pull) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(left, right)


def test_other_kinds_of_branch_are_left_to_peft(starter_home: pathlib.Path) -> None:
    import peft

    from services.trainer.worker.fast import linears

    it = peft_model(starter_home, "none", "fp32", fast=False)
    base = it.model.unload()
    other = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    found = [linears.of(m) for m in other.modules() if hasattr(m, "lora_A")]
    assert found and all(one is None for one in found)


def test_less_is_kept_and_no_length_is_met_twice(starter_home: pathlib.Path) -> None:
    from services.trainer.worker import losses

    kept = []
    for fast in (True, False):
        it = peft_model(starter_home, "nf4", "bf16", fast=fast, targets=ALL)
        (batch, _), _ = batches(it)
        frozen = {p.untyped_storage().data_ptr() for p in it.model.parameters()}
        held: dict[int, int] = {}

        def keep(t, frozen: set[int] = frozen, held: dict[int, int] = held):
            if t.untyped_storage().data_ptr() not in frozen:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with it.torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            it.loss(batch)
        kept.append(sum(held.values()))
    assert kept[0] < 0.6 * kept[1], kept

    full = losses.filled(batch)
    length = full["input_ids"].shape[1]
    assert length % losses.ROUND_TOKENS == 0 and length - batch["input_ids"].shape[1] < losses.ROUND_TOKENS
    assert losses.filled(full) is full
    assert int((full["labels"] != -100).sum()) == int((batch["labels"] != -100).sum())
