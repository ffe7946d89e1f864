"""Guards: what is trouble, that a skipped step leaves everything as it was, and that all is told."""

from __future__ import annotations

import math
import pathlib
import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common import frames
from services.common.frames.v1 import training_pb2
from services.trainer import guards, launch
from tests.trainer.kit import small
from tests.trainer.lives import Life, at
from tests.trainer.test_recipe import Rows, made_rows, peft_model

pytestmark = pytest.mark.filterwarnings("ignore")
TIGHT = guards.Rules(spike=guards.STOP, factor=3.0)


def usual(losses: list[float]) -> guards.Usual:
    found = guards.Usual()
    for loss in losses:
        found = found.after(loss)
    return found


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.floats(0, 20))
def test_a_spike_is_far_above_what_is_usual_and_never_below(losses: list[float], loss: float) -> None:
    told = usual(losses)
    assert min(losses) - 1e-9 <= told.smoothed <= max(losses) + 1e-9
    assert 0 < told.usual_distance <= max(max(losses) - min(losses), 0.011 * max(losses)) * (1 + 1e-9)
    found = guards.of_loss(9, loss, told, TIGHT)
    far = loss > told.smoothed + 3 * told.usual_distance
    assert (found is not None) == (far and len(losses) >= guards.JUDGED_FROM)
    assert guards.of_loss(9, told.smoothed, told, TIGHT) is None
    if found is not None:
        assert (found.kind, found.done, found.value) == ("SPIKE", guards.STOP, loss) and "step 9" in found.message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_trouble_from_the_first_step(value: float) -> None:
    for found in (guards.of_loss(1, value, guards.Usual(), TIGHT), guards.of_gradient(1, value, TIGHT)):
        assert found is not None and (found.kind, found.done) == ("NOT_FINITE", guards.STOP)
    assert guards.of_gradient(1, 0.0, TIGHT) is None


def test_a_spec_of_before_has_the_shipped_guards() -> None:
    assert guards.rules_of(trainer_pb2.TrainSpec()) == guards.Rules()


def test_the_scale_of_fp16_halves_where_it_runs_over_and_doubles_after_a_while() -> None:
    spec = trainer_pb2.TrainSpec()
    assert guards.scale_of(spec, 0.0, 0) == guards.Scale(1.0)
    spec.quantization.compute_type = trainer_pb2.COMPUTE_TYPE_FP16
    scale = guards.scale_of(spec, 0.0, 0)
    assert scale.value == guards.FIRST_SCALE and scale.after(True) == guards.Scale(guards.FIRST_SCALE / 2)
    for _ in range(guards.GROWS_AFTER):
        scale = scale.after(False)
    assert scale == guards.Scale(2 * guards.FIRST_SCALE)
    assert guards.Scale(1.0).after(True).value == 1.0


class Spoilt:
    """A loss that is changed on its way."""

    def __init__(self, inner: Any, change: Callable[[Any], Any]) -> None:
        self.aim, self._inner, self._change = inner.aim, inner, change

    def __call__(self, batch: Any) -> Any:
        return self._change(self._inner(batch))


class Bench:
    """One step after another on the real stack, with a loss that can be spoilt."""

    def __init__(self, home: pathlib.Path, folder: pathlib.Path, **policies: Any) -> None:
        from services.trainer.worker import checkpoint
        from services.trainer.worker.facts import Teller

        self.it: types.SimpleNamespace = peft_model(home, "none", "fp32")
        self.it.spec.schedule.kind = trainer_pb2.SCHEDULE_KIND_LINEAR
        for name, value in policies.items():
            setattr(self.it.spec.guards, name, value)
        self.rows: Any = made_rows(4, seed=9)
        self.progress = checkpoint.Progress("j")
        self.folder = folder
        self.teller = Teller(folder)

    def step(self, spoilt: Callable[[Any], Any] = lambda loss: loss) -> Any:
        from services.trainer.worker.batches import Step

        step = Step(self.progress.step + 1, 0, self.progress.step, 100, ((0, 1), (2, 3)))
        loss = Spoilt(self.it.loss, spoilt)
        done = self.it.step.one_step(
            self.it.engine,
            loss,
            self.rows,
            step,
            100,
            self.it.spec,
            "cpu",
            self.teller,
            self.progress,
        )
        self.progress = self.it.step.after_step(self.progress, step, done)
        return done

    def state(self) -> dict[str, Any]:
        """Every weight and every piece of the optimiser's state."""
        found = {n: p.detach().clone() for n, p in self.it.engine.parameters.items()}
        for name, p in self.it.engine.parameters.items():
            found |= {f"{k}:{name}": v.clone() for k, v in self.it.engine.optimizer.state.get(p, {}).items()}
            assert p.grad is None, "the gradient is gone"
        return found

    def same(self, other: dict[str, Any]) -> bool:
        now = self.state()
        return now.keys() == other.keys() and all(self.it.torch.equal(now[k], other[k]) for k in now)

    def troubles(self) -> list[trainer_pb2.Trouble]:
        bodies, _ = frames.unpack_all((self.folder / launch.FACTS).read_bytes())
        told = [training_pb2.Fact.FromString(body) for body in bodies]
        return [f.trouble for f in told if f.HasField("trouble")]


def test_a_skipped_step_leaves_weights_optimiser_and_schedule_and_the_data_goes_on(
    starter_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bench = Bench(starter_home, tmp_path, not_finite=guards.SKIP, spike=guards.SKIP, spike_factor=5.0, max_skips=3)
    rate = bench.step().learning_rate
    before, usual_before = bench.state(), bench.it.step.usual_of(bench.progress)
    nan = bench.step(lambda loss: loss * math.nan)
    steep = bench.step(lambda loss: loss + (loss.detach() - loss).abs().sqrt())  # its slope there is no number
    for done in (nan, steep):
        assert done.skipped and not done.overflowed and done.tokens and done.learning_rate < rate
    assert math.isnan(nan.loss) and math.isfinite(steep.loss) and not math.isfinite(steep.grad_norm)
    assert bench.same(before) and bench.it.step.usual_of(bench.progress) == usual_before
    assert (bench.progress.step, bench.progress.skipped, bench.progress.skips) == (3, 2, 2)
    good = bench.step()
    assert not good.skipped and good.learning_rate == nan.learning_rate == steep.learning_rate, "the schedule waited"
    assert bench.progress.skips == 0 and not bench.same(before)
    assert bench.progress.epoch_tokens == 4 * good.tokens, "what was skipped was consumed"
    for _ in range(guards.JUDGED_FROM):
        bench.step()
    before = bench.state()
    assert bench.step(lambda loss: loss * 50).skipped and bench.same(before)
    told = [(t.step, t.kind, t.done) for t in bench.troubles()]
    assert told == [(2, "NOT_FINITE", guards.SKIP), (3, "NOT_FINITE", guards.SKIP), (15, "SPIKE", guards.SKIP)]
    bench.step(lambda loss: loss * math.nan)
    with pytest.raises(bench.it.step.NotFinite, match=r"step 17 .* 3 steps in a row were to be skipped"):
        bench.step(lambda loss: loss * math.nan)
    assert bench.troubles()[-1].done == guards.STOP


def test_a_spike_that_is_only_told_is_trained_on(starter_home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bench = Bench(starter_home, tmp_path)
    for _ in range(guards.JUDGED_FROM):
        bench.step()
    before = bench.state()
    done = bench.step(lambda loss: loss * 50)
    assert not done.skipped and not bench.same(before)
    (told,) = bench.troubles()
    assert (told.kind, told.done, told.value) == ("SPIKE", guards.CONTINUE, done.loss)
    bench.it.spec.guards.spike = guards.STOP
    with pytest.raises(bench.it.step.Spike, match=r"guards\.spike_factor 8"):
        bench.step(lambda loss: loss * 5000)


def test_a_step_without_a_trained_token_is_named_and_stops_or_is_skipped(
    starter_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from services.trainer.worker.train import error_of

    bench = Bench(starter_home, tmp_path)
    bench.step()
    bench.rows = Rows([(list(range(5, 9)), [1, 0, 0, 0])] * 4)  # the first token of a row cannot carry loss
    before = bench.state()
    with pytest.raises(
        bench.it.step.AllMasked, match=r"no token of step 2 carries loss \(rows \[0, 1, 2, 3\]\)"
    ) as caught:
        bench.step()
    assert error_of(caught.value).reason == "BAD_DATA"
    bench.it.spec.guards.all_masked = guards.SKIP
    done = bench.step()
    assert (
        done.skipped and (done.tokens, done.trained, done.marked, done.loss) == (16, 0, 4, 0.0) and bench.same(before)
    )
    assert [(t.kind, t.done) for t in bench.troubles()] == [("ALL_MASKED", guards.STOP), ("ALL_MASKED", guards.SKIP)]


def test_an_overflow_of_fp16_is_no_trouble_and_its_scale_changes_no_gradient(
    starter_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain, scaled = Bench(starter_home, tmp_path), Bench(starter_home, tmp_path)
    scaled.it.spec.quantization.compute_type = trainer_pb2.COMPUTE_TYPE_FP16  # the model stays fp32: the scale alone
    one, other = plain.step(), scaled.step()
    assert other.loss_scale == guards.FIRST_SCALE and one.loss_scale == 1.0
    assert math.isclose(one.grad_norm, other.grad_norm, rel_tol=1e-6) and one.loss == other.loss
    before = scaled.state()
    done = scaled.step(lambda loss: loss * 1e36)
    assert done.skipped and done.overflowed and scaled.same(before) and not scaled.troubles()
    assert scaled.progress.loss_scale == guards.FIRST_SCALE / 2 and scaled.progress.skips == 0
    again = scaled.step()
    assert again.loss_scale == guards.FIRST_SCALE / 2 and not again.skipped


def test_a_guard_that_stops_a_job_keeps_its_last_good_step(
    small_home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut and resumed before it, it stops at the same step for the same reason: what is usual is in the checkpoint."""
    from services.trainer.worker import losses, recipe

    now, whole = [0], recipe.one_step

    def watched(engine: Any, loss_of: Any, rows: Any, step: Any, *more: Any) -> Any:
        now[0] = step.number
        return whole(engine, loss_of, rows, step, *more)

    def spoil(model: Any, aim: Any) -> tuple[Any, str]:
        inner = losses.Chunked(model, aim)
        return Spoilt(inner, lambda loss: loss * (40.0 if model.training and now[0] == 14 else 1.0)), ""

    monkeypatch.setattr(recipe, "one_step", watched)
    monkeypatch.setattr(recipe.losses, "of", spoil)
    spec = small(30, guards__spike=guards.STOP, checkpoints__every_steps=5, data__micro_batch_tokens=4096)
    messages = []
    for cut in (False, True):
        life = Life(small_home, tmp_path / str(cut), spec)
        if cut:
            life.attempt(killed=at("step", 12))
        life.attempt()
        assert life.job.state == trainer_pb2.JOB_STATE_FAILED and life.job.error.reason == "SPIKE"
        assert [m.step for m in life.record.marks] == [10, 13], "the newest whole step before it"
        messages.append(life.job.error.message)
    assert "the loss of step 14 is" in messages[0] and messages[0] == messages[1]
