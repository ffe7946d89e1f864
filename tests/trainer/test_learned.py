"""What is learned from jobs before: time and the correction of memory, and the door that asks."""

from __future__ import annotations

import pathlib

import pytest

from qlorad.v1 import trainer_pb2
from services.trainer import history
from tests.house import House
from tests.trainer.kit import create, small, stub_of, watch


def ended(steps: int, seconds: float, **fields: object) -> trainer_pb2.Job:
    """A job that took five seconds to start, a second a step of 100 tokens."""
    job = trainer_pb2.Job(spec=small(steps, **fields), state=trainer_pb2.JOB_STATE_SUCCEEDED, total_steps=steps)
    job.start_time.FromSeconds(1000)
    job.end_time.FromSeconds(int(1000 + seconds))
    job.result.steps, job.result.tokens = steps, 100 * steps
    job.result.predicted_memory_bytes, job.result.measured_memory_bytes = 1000, 1200
    job.metrics.tokens_per_second, job.metrics.epoch = 100.0, steps / 10
    return job


def test_jobs_of_the_same_shape_tell_the_time() -> None:
    before = [ended(20, 25), ended(40, 45), ended(20, 25, lora__rank=64)]
    told = history.judge(small(100, seed=9).train, 1, 10**6, before)
    assert told.seconds == pytest.approx(105) and "2 jobs of the same shape" in told.judged_from
    by_epochs = small(0)
    by_epochs.train.schedule.epochs = 3.0
    assert history.judge(by_epochs.train, 1, 10**6, before).seconds == pytest.approx(5 + 30)
    assert told.correction == pytest.approx(1.2) and "3 jobs took 1.20" in told.judged_from


def test_another_shape_is_told_at_most_and_an_unknown_one_not_at_all() -> None:
    other = small(10, data__max_length_tokens=64).train
    told = history.judge(other, 10**6, 10**6, [ended(20, 25)])
    assert told.seconds == pytest.approx(10 * 256 / 100) and "time, at most" in told.judged_from
    nothing = history.judge(other, 10**6, 10**6, [])
    assert (nothing.seconds, nothing.correction, nothing.judged_from) == (None, 1.0, "")
    failed = ended(20, 25)
    failed.state = trainer_pb2.JOB_STATE_FAILED
    assert history.judge(other, 10**6, 10**6, [failed]) == nothing


def test_a_correction_has_bounds() -> None:
    wild = ended(20, 25)
    wild.result.measured_memory_bytes = 10**9
    assert history.judge(wild.spec.train, 1, 1, [wild]).correction == history.MOST


@pytest.mark.slow
def test_an_estimate_learns_from_the_job_before(trainer: House, small_home: pathlib.Path) -> None:
    stub = stub_of(trainer)
    request = trainer_pb2.EstimateJobRequest(spec=small(6))
    first = stub.EstimateJob(request, timeout=20)
    assert not first.HasField("seconds") and first.correction == 1.0
    list(watch(stub, create(stub, small(6), "one").name))
    second = stub.EstimateJob(request, timeout=20)
    assert second.seconds > 0 and "1 jobs of the same shape" in second.judged_from
    assert second.correction != 1.0 and second.needed_bytes == round(first.needed_bytes * second.correction)
