"""A paused job goes on in another number of processes: what changes, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.trainer import jobs, resize, spec

HOST = spec.Host("cpu", 4)


def asked(ranks: int, accumulation: int, stage: int = 0) -> trainer_pb2.TrainSpec:
    train = trainer_pb2.TrainSpec()
    train.parallelism.ranks, train.parallelism.zero_stage = ranks, stage
    train.data.accumulation = accumulation
    train.optimizer.kind = trainer_pb2.OPTIMIZER_KIND_ADAMW
    return train


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 16))
def test_a_step_keeps_its_micro_batches_or_the_wish_is_refused(before: int, accumulation: int, ranks: int) -> None:
    train = asked(before, accumulation, 3 if before > 1 else 0)
    batches = before * accumulation
    if batches % ranks:
        with pytest.raises(Fault) as caught:
            resize.resized(train, ranks, HOST, ["cpu"])
        (wrong,) = caught.value.violations
        assert wrong.field == "ranks" and str(batches) in wrong.accepted
        return
    told = resize.resized(train, ranks, HOST, ["cpu"])
    if ranks == before:
        assert told is None
        return
    assert told is not None and told.ranks * told.accumulation == batches
    assert told.zero_stage == (0 if ranks == 1 else 3 if before > 1 else 2)
    record = training_pb2.JobRecord()
    record.job.spec.train.CopyFrom(train)
    after = jobs.fold(record, trainer_pb2.Event(sequence=1, resized=told)).job.spec.train
    assert (after.parallelism.ranks, after.data.accumulation) == (ranks, told.accumulation)
    assert not list(spec.of_ranks(after, HOST)), "what it became could have been asked for"


def test_what_several_processes_cannot_do_is_refused_here_too() -> None:
    train = asked(1, 4)
    train.optimizer.kind = trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT
    with pytest.raises(Fault) as caught:
        resize.resized(train, 2, HOST, ["cpu"])
    assert "optimizer.kind" in caught.value.violations[0].accepted
    with pytest.raises(Fault) as caught:
        resize.resized(asked(1, 4), 4, spec.Host("cuda:0", 4), ["cuda:0", "cuda:1"])
    assert "1 to 2 here" in caught.value.violations[0].accepted
    free = asked(2, 0, 2)  # step_tokens decides, and nothing has begun
    told = resize.resized(free, 3, HOST, ["cpu"])
    assert told is not None and (told.ranks, told.accumulation) == (3, 0)


@pytest.mark.parametrize("state", ["RUNNING", "QUEUED", "SUCCEEDED"])
def test_only_a_paused_job_can_be_resized(state: str) -> None:
    record = training_pb2.JobRecord()
    record.job.state = trainer_pb2.JobState.Value(f"JOB_STATE_{state}")
    with pytest.raises(Fault) as caught:
        jobs.wish_to_resume(record, True)
    assert "PAUSED" in str(caught.value)
