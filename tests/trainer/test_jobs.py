"""The law of states, the fold of events, the queue: properties of the pure core."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.trainer import jobs, launch
from tests.house import ROOT
from tests.trainer.lawful import published_law

Wish = Callable[[training_pb2.JobRecord], trainer_pb2.Event | None]
STATES = st.sampled_from([s for s in trainer_pb2.JobState.values() if s])


def test_the_law_is_the_published_one() -> None:
    law = published_law()
    assert len(law) == len(trainer_pb2.JobState.values()) - 1
    assert law == dict(jobs.LAW)


def queued(keep_last: int = 2, max_attempts: int = 3) -> training_pb2.JobRecord:
    record = training_pb2.JobRecord()
    record.job.name = "jobs/a"
    record.job.state = trainer_pb2.JOB_STATE_QUEUED
    record.job.spec.train.checkpoints.keep_last = keep_last
    record.job.spec.train.limits.max_attempts = max_attempts
    return write(record, jobs.moved(record, trainer_pb2.JOB_STATE_QUEUED))


def write(record: training_pb2.JobRecord, *events: trainer_pb2.Event) -> training_pb2.JobRecord:
    for event in events:
        event.sequence = record.job.last_sequence + 1
        event.time.FromSeconds(event.sequence)
        record = jobs.fold(record, event)
    return record


def started(record: training_pb2.JobRecord) -> training_pb2.JobRecord:
    attempt = record.job.attempt + 1
    event = trainer_pb2.Event(attempt=attempt)
    event.attempt_started.attempt = attempt
    event.attempt_started.from_step = jobs.resume_from(record).step
    return write(record, jobs.moved(record, trainer_pb2.JOB_STATE_PREPARING), event)


@given(st.lists(STATES, max_size=12))
def test_no_sequence_of_moves_leaves_the_law(wished: list[int]) -> None:
    record = queued()
    law = published_law()
    for to in wished:
        state = record.job.state
        if to in law[state]:
            record = write(record, jobs.moved(record, to))
            assert record.job.state == to and record.job.is_terminal == (not law[to])
        else:
            with pytest.raises(jobs.Unlawful):
                write(record, jobs.moved(record, to))
            assert record.job.state == state


def test_a_gap_or_a_double_in_the_numbers_is_refused() -> None:
    record = queued()
    for sequence in (1, 3):
        event = trainer_pb2.Event(sequence=sequence, log=trainer_pb2.LogLine(text="x"))
        with pytest.raises(jobs.Unlawful):
            jobs.fold(record, event)


PLANNED = training_pb2.Fact(planned=trainer_pb2.Planned(total_steps=40))


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6), st.integers(1, 4))
def test_whatever_is_lost_tokens_and_steps_count_once(lives: list[tuple[int, bool]], keep_last: int) -> None:
    """Attempts of random length, each cut after some steps; a checkpoint at every second step."""
    record = queued(keep_last, max_attempts=100)
    reached = 0
    for steps, _ in lives:
        record = started(record)
        for event in jobs.events_of(record, PLANNED):
            record = write(record, event)
        begin = jobs.resume_from(record).step
        assert record.job.result.steps == begin and record.job.result.tokens == begin * 10
        for step in range(begin + 1, begin + steps + 1):
            metrics = trainer_pb2.StepMetrics(step=step, loss=1.0, tokens=10)
            record = write(record, *jobs.events_of(record, training_pb2.Fact(step=metrics)))
            if step % 2 == 0:
                sealed = trainer_pb2.CheckpointSealed(step=step, digest=f"sha256:{step}")
                record = write(record, trainer_pb2.Event(checkpoint_sealed=sealed))
                assert record.lost == 0
            assert record.job.result.tokens == step * 10
        reached = max(reached, (begin + steps) // 2 * 2)
        record = write(record, *jobs.after_lost(record, "killed", ""))
        assert record.job.state == trainer_pb2.JOB_STATE_QUEUED
        assert jobs.resume_from(record).step == reached
        assert len(record.marks) <= keep_last and sorted(m.step for m in record.marks) == [m.step for m in record.marks]


def test_after_the_last_attempt_a_lost_worker_fails_the_job() -> None:
    record = queued(max_attempts=2)
    for expected in (trainer_pb2.JOB_STATE_QUEUED, trainer_pb2.JOB_STATE_FAILED):
        record = started(record)
        record = write(record, *jobs.after_lost(record, "was ended by SIGKILL", "the tail"))
        assert record.job.state == expected
    assert record.job.error.reason == "WORKER_LOST" and record.job.error.log_tail == "the tail"
    assert "SIGKILL" in record.job.error.message


def test_a_lost_worker_of_a_cancelling_job_leaves_it_cancelled() -> None:
    record = started(queued())
    record = write(record, jobs.moved(record, trainer_pb2.JOB_STATE_CANCELLING))
    assert write(record, *jobs.after_lost(record, "x", "")).job.state == trainer_pb2.JOB_STATE_CANCELLED


@pytest.mark.parametrize("lost", [False, True])
def test_a_pause_costs_no_attempt_and_no_time(lost: bool) -> None:
    record = queued(max_attempts=1)
    for _ in range(3):
        record = started(record)  # the clock of these events goes one second an event
        record = write(record, wished(jobs.wish_to_pause, record))
        assert record.job.state == trainer_pb2.JOB_STATE_PAUSING and jobs.wish_to_pause(record) is None
        record = write(record, *(jobs.after_lost(record, "killed", "") if lost else jobs.after_stopped(record)))
        assert record.job.state == trainer_pb2.JOB_STATE_PAUSED and jobs.wish_to_pause(record) is None
        before = jobs.seconds_at_work(record, record.resting_since.seconds)
        record = write(record, wished(jobs.wish_to_resume, record))
        record = write(record, wished(jobs.wish_to_pause, record))  # from the queue: no attempt, the same rest
        record = write(record, wished(jobs.wish_to_resume, record))
    assert record.job.attempt == record.spared == 3
    record = started(record)
    begun = record.job.last_sequence - 1  # PREPARING; the attempt's own event follows
    assert jobs.seconds_at_work(record, begun) == before == 3 * 3  # PREPARING, started, PAUSING; then it rests
    assert launch.order_of(record, "/", ["cpu"], 30.0, begun).HasField("seconds_left") is False
    record.job.spec.train.limits.max_seconds = 100
    assert launch.order_of(record, "/", ["cpu"], 30.0, begun).seconds_left == 100 - before
    record = write(record, *jobs.after_lost(record, "killed", ""))
    assert record.job.state == trainer_pb2.JOB_STATE_FAILED and "attempt 1 of 1" in record.job.error.message


WISHES = {"pause": jobs.wish_to_pause, "resume": jobs.wish_to_resume, "cancel": jobs.wish_to_cancel}
DEEDS = ("start", "plan", "step", "step", "checkpoint", "stop", "lose", "finish", "pause", "resume", "resume")


def wished(wish: Wish, record: training_pb2.JobRecord) -> trainer_pb2.Event:
    event = wish(record)
    assert event is not None
    return event


def lived(record: training_pb2.JobRecord, deed: str) -> training_pb2.JobRecord:
    """The job after a worker, the queue or a caller did something, where that can be."""
    state, steps = record.job.state, record.job.result.steps
    if deed in WISHES:
        try:
            event = WISHES[deed](record)
        except Fault as fault:
            assert fault.reason == errors_pb2.REASON_WRONG_STATE and jobs.word(state) in fault.message
            return record
        return record if event is None else write(record, event)
    if deed == "start":
        return started(record) if state == trainer_pb2.JOB_STATE_QUEUED else record
    if state not in jobs.WITH_WORKER or state == trainer_pb2.JOB_STATE_FINALIZING:
        return record
    sealed = trainer_pb2.Event(checkpoint_sealed=trainer_pb2.CheckpointSealed(step=steps, digest=f"sha256:{steps}"))
    metrics = training_pb2.Fact(step=trainer_pb2.StepMetrics(step=steps + 1, loss=1.0, tokens=10))
    match deed:
        case "plan":
            return write(record, *jobs.events_of(record, PLANNED))
        case "step":
            return write(record, *jobs.events_of(record, metrics))
        case "checkpoint":
            return write(record, sealed)
        case "stop" if state in jobs.STOPPING:
            record = write(record, sealed)
            return write(record, *jobs.after_stopped(record))
        case "lose":
            return write(record, *jobs.after_lost(record, "killed", ""))
        case "finish" if state != trainer_pb2.JOB_STATE_PREPARING:
            return write(record, *jobs.events_of(record, training_pb2.Fact(finished=training_pb2.Finished())))
    return record


@given(st.lists(st.sampled_from((*DEEDS, "cancel")), max_size=60), st.integers(1, 3))
def test_whatever_is_done_to_a_job_the_law_holds(deeds: list[str], max_attempts: int) -> None:
    """Unlawful is raised by nothing; pauses use no attempt up; every step counts once; a pause keeps the work."""
    record = queued(max_attempts=max_attempts)
    lost = 0
    for deed in deeds:
        before = record
        record = lived(record, deed)
        state, was = record.job.state, before.job.state
        lost += deed == "lose" and was in (trainer_pb2.JOB_STATE_PREPARING, trainer_pb2.JOB_STATE_RUNNING)
        if state == trainer_pb2.JOB_STATE_FAILED:
            assert lost == max_attempts
        if state == trainer_pb2.JOB_STATE_PAUSED:
            assert not record.job.HasField("queue") and not record.job.is_terminal
        if deed == "stop" and was == trainer_pb2.JOB_STATE_PAUSING:
            assert jobs.resume_from(record).step == before.job.result.steps
        if deed == "start" and was == trainer_pb2.JOB_STATE_QUEUED:
            assert record.job.result.steps == jobs.resume_from(record).step
        assert record.job.result.tokens == 10 * record.job.result.steps
        assert record.job.attempt - record.spared <= max_attempts
        again = {s for s, w in (("PAUSED", "pause"), ("QUEUED", "resume"), ("CANCELLED", "cancel")) if w == deed}
        if jobs.word(state) in again:
            assert WISHES[deed](record) is None, "asking twice changes nothing"


@given(st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 3)), min_size=1, max_size=8))
def test_the_queue_goes_by_priority_then_age(given_: list[tuple[int, int]]) -> None:
    waiting = []
    for number, (priority, delay) in enumerate(given_):
        record = training_pb2.JobRecord()
        record.job.name, record.job.priority = f"jobs/{number}", priority
        record.job.create_time.FromSeconds(number)
        waiting.append(jobs.Waiting(record, float(delay)))
    queue = jobs.in_order(waiting)
    keys = [(-w.record.job.priority, w.record.job.create_time.seconds) for w in queue]
    assert keys == sorted(keys)
    first = jobs.next_to_start(queue, now=1.0)
    assert first is None or (first.not_before <= 1.0 and all(w.not_before > 1.0 for w in queue[: queue.index(first)]))
    busy = trainer_pb2.QueuePlace(reason=trainer_pb2.QUEUE_REASON_DEVICE_BUSY, owner="somebody", owner_bytes=7)
    places = jobs.places(queue, 1.0, busy, [None] * len(queue))
    assert [p.position for p in places] == list(range(1, len(queue) + 1))
    busy = [p for p in places if p.reason == trainer_pb2.QUEUE_REASON_DEVICE_BUSY]
    assert len(busy) == (first is not None) and all(p.owner == "somebody" and p.owner_bytes == 7 for p in busy)


def test_back_off_doubles_up_to_a_minute() -> None:
    assert [jobs.backoff_seconds(n, 1.0) for n in (0, 1, 2, 3, 10)] == [0.0, 1.0, 2.0, 4.0, 60.0]


def test_no_daemon_file_of_the_trainer_names_torch() -> None:
    files = sorted(pathlib.Path(ROOT / "services/trainer").glob("*.py"))
    assert len(files) >= 12
    for path in files:
        assert not re.search(
            r"^\s*(import|from) (torch|peft|transformers|bitsandbytes|deepspeed)", path.read_text(), re.M
        )
