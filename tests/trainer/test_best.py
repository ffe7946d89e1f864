"""Early stopping and the best adapter: what an evaluation decides, cut at every moment and resumed."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from tests.trainer.kit import small
from tests.trainer.lives import Life, Moment, at

pytestmark = pytest.mark.filterwarnings("ignore")


def evaluations(told: list[training_pb2.Fact]) -> list[tuple[int, float]]:
    return [(f.evaluated.step, f.evaluated.loss) for f in told if f.HasField("evaluated")]


@pytest.fixture(scope="module")
def judging() -> tuple[Any, Any]:
    from services.trainer.worker import checkpoint, evaluation

    return evaluation, checkpoint.Progress


LOSSES = st.lists(st.one_of(st.integers(1, 9).map(float), st.just(math.nan)), min_size=1, max_size=12)


@given(LOSSES, st.sampled_from([0.0, 1.0, 2.5]), st.integers(0, 4))
def test_the_best_is_the_first_of_the_lowest_and_patience_counts_what_did_not_improve(
    judging: tuple[Any, Any], losses: list[float], least: float, patience: int
) -> None:
    evaluation, Progress = judging
    progress = evaluation.judged(Progress("j"), 0.5, least)  # before training: nothing is compared with it
    assert (progress.best_loss, progress.stale, progress.evaluated) == (None, 0, 0)
    stale = 0
    for number, loss in enumerate(losses, start=1):
        before = [x for x in losses[: number - 1] if not math.isnan(x)]
        stale = 0 if not math.isnan(loss) and loss < min(before, default=math.inf) - least else stale + 1
        progress = evaluation.judged(dataclasses.replace(progress, step=number), loss, least)
        told = [x for x in losses[:number] if not math.isnan(x)]
        if told:
            assert (progress.best_loss, progress.best_step) == (min(told), losses.index(min(told)) + 1)
        assert progress.stale == stale
        assert evaluation.ends_early(progress, patience) == (patience > 0 and stale >= patience)


def overfits(**more: object) -> trainer_pb2.JobSpec:
    """Twelve rows learnt by heart at a rate far too high: the hold-out loss turns."""
    fields: dict[str, object] = {
        "evaluation__every_steps": 2,
        "evaluation__patience": 3,
        "evaluation__keep_best_adapter": True,
        "checkpoints__every_steps": 3,
        "checkpoints__keep_last": 1,
        "optimizer__learning_rate": 0.03,
    }
    return small(60, **{**fields, **more})


def test_a_job_ends_early_with_its_best_adapter_wherever_it_was_cut(
    small_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    calm = Life(small_home, tmp_path / "calm", overfits())
    told = calm.attempt()
    assert told[-1].finished.end == trainer_pb2.END_REASON_EARLY_STOP, told[-1]
    found = evaluations(told)
    best = min(found[1:], key=lambda pair: pair[1])
    last = found[-1][0]
    assert best[0] == last - 6 > 2, "three evaluations after the lowest, it ended"
    assert (calm.job.result.best_step, calm.job.result.best_eval_loss) == best
    assert any(f"the adapter is that of step {best[0]}" in f.log.text for f in told)
    marks = {m.step: m.eval_loss for m in calm.record.marks}
    assert marks == {best[0]: best[1], last: found[-1][1]}, "the newest, and the one that the adapter is of"

    other = Life(small_home, tmp_path / "last", overfits(evaluation__keep_best_adapter=False))
    other.attempt()
    assert other.adapter() != calm.adapter(), "the adapter of the last step is another"

    cuts: list[tuple[Moment | None, Moment | None]] = [
        (at("evaluated", 2), None),
        (at("checkpoint", best[0]), None),
        (at("step", best[0] + 1), None),
        (None, at("step", last)),  # asked to stop between a step and its evaluation
    ]
    cut = Life(small_home, tmp_path / "cut", overfits())
    for killed, stopped in cuts:
        cut.attempt(killed, stopped)
        assert cut.job.state == trainer_pb2.JOB_STATE_QUEUED
    assert (cut.record.marks[-1].step, cut.record.marks[-1].HasField("eval_loss")) == (last, False)
    end = cut.attempt()
    assert evaluations(end) == [found[-1]], "made up before anything else, and once"
    assert [f.WhichOneof("fact") for f in end][-1] == "finished" and not any(f.HasField("step") for f in end)
    assert end[-1].finished.end == trainer_pb2.END_REASON_EARLY_STOP
    assert cut.adapter() == calm.adapter()
    assert (cut.job.result.best_step, cut.job.result.best_eval_loss) == best


def test_an_evaluation_that_a_stop_cut_off_is_made_up_on_resume(
    small_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The moment is picked: the wish to stop is laid down when the step has been told, before it is evaluated."""
    spec = small(6, evaluation__every_steps=2, checkpoints__every_steps=0)
    calm, cut = Life(small_home, tmp_path / "calm", spec), Life(small_home, tmp_path / "cut", spec)
    whole = evaluations(calm.attempt())
    assert [step for step, _ in whole] == [0, 2, 4, 6]
    first = cut.attempt(stopped=at("step", 4))
    assert first[-1].stopped.step == 4 and evaluations(first) == whole[:2]
    second = cut.attempt()
    kinds = [f.WhichOneof("fact") for f in second if not f.HasField("log")]
    assert kinds[:3] == ["planned", "evaluated", "step"], "before it trains on"
    assert evaluations(second) == whole[2:]
    assert cut.adapter() == calm.adapter()
