"""PauseJob and ResumeJob from outside: the work is kept, the device is free, the end is the same.

A worker that must not be quicker than the test is frozen with SIGSTOP: what
happens then is no matter of time.
"""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Iterator

import grpc
import pytest

from qlorad.v1 import trainer_pb2 as pb
from services.common.shelf import Shelf
from tests.house import House, eventually
from tests.trainer.kit import create, facts, get, small, stub_of, watch, worker_of
from tests.trainer.test_door import held, refused, waiting  # noqa: F401

LINUX = pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds workers by /proc")


def pause(made: House, name: str, request_id: str) -> pb.Job:
    return stub_of(made).PauseJob(pb.PauseJobRequest(request_id=request_id, name=name), timeout=10).job


def resume(made: House, name: str, request_id: str) -> pb.Job:
    return stub_of(made).ResumeJob(pb.ResumeJobRequest(request_id=request_id, name=name), timeout=10).job


def cancel(made: House, name: str) -> pb.Job:
    return stub_of(made).CancelJob(pb.CancelJobRequest(request_id="cancel", name=name), timeout=10).job


def until(made: House, name: str, state: pb.JobState.ValueType) -> pb.Job:
    """The job once it is in a state."""

    def look() -> pb.Job | None:
        job = get(stub_of(made), name)
        assert not job.is_terminal or job.state == state, job
        return job if job.state == state else None

    return eventually(look, 60, pb.JobState.Name(state))


def frozen_at(made: House, name: str, step: int) -> int:
    """The pid of a job's worker, frozen once it has told of a step."""
    for event in watch(stub_of(made), name):
        if event.HasField("step") and event.step.step >= step:
            worker = worker_of(made.home, name)
            os.kill(worker, signal.SIGSTOP)
            return worker
    raise AssertionError(f"{name} ended before step {step}")


@pytest.fixture
def workers(trainer: House) -> Iterator[list[int]]:
    """Frozen workers, killed at the end whatever happens."""
    found: list[int] = []
    yield found
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def steps_of(events: list[pb.Event]) -> list[tuple[int, float]]:
    return [(e.step.step, e.step.loss) for e in events if e.HasField("step")]


def evaluations_of(events: list[pb.Event]) -> list[tuple[int, float]]:
    return [(e.evaluated.step, e.evaluated.loss) for e in events if e.HasField("evaluated")]


def events_now(made: House, job: pb.Job) -> list[pb.Event]:
    """Every event up to a state of the job that was read."""
    found = []
    for event in watch(stub_of(made), job.name):
        found.append(event)
        if event.sequence == job.last_sequence:
            break
    return found


@LINUX
def test_a_paused_job_frees_the_device_and_ends_as_if_undisturbed(trainer: House, workers: list[int]) -> None:
    """One attempt is allowed: the pause does not use it up. The daemon is begun anew while the job is PAUSED."""
    spec = small(20, checkpoints__every_steps=0, evaluation__every_steps=2, limits__max_attempts=1)
    job = create(stub_of(trainer), spec, "paused", job_id="paused")
    workers.append(frozen_at(trainer, job.name, 2))
    asked = pause(trainer, job.name, "p")
    assert asked.state == pb.JOB_STATE_PAUSING == pause(trainer, job.name, "other").state
    refused(lambda: resume(trainer, job.name, "soon"), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    os.kill(workers[-1], signal.SIGCONT)
    kept = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    assert 2 <= kept.result.steps < 20
    shelf = Shelf(trainer.home / "store")
    needed = (kept.result.checkpoint_digest, job.spec.train.model.removeprefix("models/"))

    calm = create(stub_of(trainer), spec, "calm", job_id="calm")  # the device is free
    undisturbed = list(watch(stub_of(trainer), calm.name))
    done = get(stub_of(trainer), calm.name)
    assert done.state == pb.JOB_STATE_SUCCEEDED, done.error
    eventually(lambda: [shelf.holders(digest) for digest in needed] == [[job.name]] * 2, 10, "its holds alone")

    assert trainer.daemons["trainer"].stop() == 0
    assert [shelf.holders(digest) for digest in needed] == [[], []]
    trainer.daemons["trainer"].start()
    assert [shelf.holders(digest) for digest in needed] == [[job.name]] * 2
    assert get(stub_of(trainer), job.name) == kept, "a paused job waits, whatever begins anew"
    assert pause(trainer, job.name, "p") == asked, "the same answer, also after a restart"
    states = pb.ListJobsRequest(states=[pb.JOB_STATE_PAUSED])
    assert [j.name for j in stub_of(trainer).ListJobs(states, timeout=10).jobs] == [job.name]

    again = resume(trainer, job.name, "r")
    assert again.state == pb.JOB_STATE_QUEUED
    events = list(watch(stub_of(trainer), job.name))
    ended = get(stub_of(trainer), job.name)
    assert ended.state == pb.JOB_STATE_SUCCEEDED and ended.attempt == 2, ended.error
    assert resume(trainer, job.name, "r") == again
    for result in (ended.result, done.result):
        result.ClearField("checkpoint_digest")  # names the job
        result.ClearField("measured_memory_bytes")
    assert ended.result == done.result and ended.result.adapter_digest
    states_told = [s for s in facts(events) if s.isupper()]
    assert states_told[:5] == ["QUEUED", "PREPARING", "RUNNING", "PAUSING", "PAUSED"]
    assert states_told[5:] == ["QUEUED", "PREPARING", "RUNNING", "FINALIZING", "SUCCEEDED"]
    assert steps_of(events) == steps_of(undisturbed) and len(steps_of(events)) == 20, "every step once, the same loss"
    assert evaluations_of(events) == evaluations_of(undisturbed)
    for call in (pause, resume):
        refused(lambda c=call: c(trainer, job.name, "late"), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")


@LINUX
@pytest.mark.slow  # what is decided there is also in test_jobs.py
def test_a_worker_killed_while_pausing_leaves_the_job_paused(trainer: House, workers: list[int]) -> None:
    spec = small(2000, evaluation__max_rows=1, limits__max_attempts=1)
    job = create(stub_of(trainer), spec, "killed", job_id="killed")
    workers.append(frozen_at(trainer, job.name, 3))
    assert pause(trainer, job.name, "1").state == pb.JOB_STATE_PAUSING
    os.kill(workers[-1], signal.SIGKILL)
    kept = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    events = events_now(trainer, kept)
    sealed = [e.checkpoint_sealed for e in events if e.HasField("checkpoint_sealed")][-1]
    assert sealed.step >= 2 and sealed.digest == kept.result.checkpoint_digest
    assert "SIGKILL" in events[-1].state_changed.message
    assert f"step {sealed.step} is kept" in events[-1].state_changed.message
    assert "INTERRUPTED" not in facts(events)

    done = cancel(trainer, job.name)
    assert done.state == pb.JOB_STATE_CANCELLED and done.result.checkpoint_digest == sealed.digest
    shelf = Shelf(trainer.home / "store")
    shelf.open("checkpoints", sealed.digest, verify=True)
    eventually(lambda: not shelf.holders(sealed.digest), 10, "the end of its holds")


@LINUX
@pytest.mark.slow
def test_a_pausing_job_outlives_its_daemon(trainer: House, workers: list[int]) -> None:
    """Paused while PREPARING, over kill -9 and SIGTERM of the daemon, over the death of both; cancelled at last."""
    job = create(stub_of(trainer), small(2000, limits__max_attempts=1), "both", job_id="both")
    daemon = trainer.daemons["trainer"]
    until(trainer, job.name, pb.JOB_STATE_PREPARING)
    pause(trainer, job.name, "1")
    early = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    assert early.result.steps == 0 and not early.HasField("metrics") and early.attempt == 1

    resume(trainer, job.name, "1")
    workers.append(frozen_at(trainer, job.name, 3))
    pause(trainer, job.name, "2")
    daemon.kill()
    told = trainer.home / "state" / "jobs" / "both" / "attempts" / "2" / "cancel"
    told.unlink()  # as if it had died before it told the worker
    daemon.start()
    assert told.exists(), "laid down again"
    assert daemon.stop() == 0
    daemon.start()
    assert get(stub_of(trainer), job.name).state == pb.JOB_STATE_PAUSING
    os.kill(workers[-1], signal.SIGCONT)
    kept = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    message = events_now(trainer, kept)[-1].state_changed.message
    assert message == f"stopped as asked; step {kept.result.steps} is kept"

    resume(trainer, job.name, "2")
    workers.append(frozen_at(trainer, job.name, kept.result.steps + 2))
    pause(trainer, job.name, "3")
    daemon.kill()
    os.kill(workers[-1], signal.SIGKILL)
    daemon.start()
    found = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    assert found.attempt == 3

    resume(trainer, job.name, "3")
    begun = [e.attempt_started for e in watched_to_step(trainer, job.name, 4) if e.HasField("attempt_started")]
    assert begun[-1].from_step >= kept.result.steps
    workers.append(worker_of(trainer.home, job.name))
    os.kill(workers[-1], signal.SIGSTOP)
    pause(trainer, job.name, "4")
    assert cancel(trainer, job.name).state == pb.JOB_STATE_CANCELLING
    refused(lambda: pause(trainer, job.name, "5"), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    os.kill(workers[-1], signal.SIGCONT)
    done = until(trainer, job.name, pb.JOB_STATE_CANCELLED)
    Shelf(trainer.home / "store").open("checkpoints", done.result.checkpoint_digest, verify=True)


def watched_to_step(made: House, name: str, attempt: int) -> list[pb.Event]:
    """Every event up to the first step of an attempt."""
    found = []
    for event in watch(stub_of(made), name):
        found.append(event)
        if event.HasField("step") and event.attempt == attempt:
            break
    return found


def test_a_job_that_waits_is_held_back_and_comes_again(waiting: House) -> None:  # noqa: F811
    stub = stub_of(waiting)
    first = create(stub, small(), "a", job_id="first")
    eventually(lambda: get(stub, first.name).queue.position == 1, 10, "a place")
    assert resume(waiting, first.name, "r0").state == pb.JOB_STATE_QUEUED, "it goes on already"
    for request_id in ("p1", "p1", "p2"):
        paused = pause(waiting, first.name, request_id)
        assert paused.state == pb.JOB_STATE_PAUSED and not paused.HasField("queue") and not paused.attempt
    others = [create(stub, small(), f"o{n}", job_id=f"other{n}").name for n in range(4)]
    refused(lambda: resume(waiting, first.name, "r1"), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    delete = pb.DeleteJobRequest(request_id="d", name=first.name)
    refused(lambda: stub.DeleteJob(delete, timeout=10), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    assert pause(waiting, others[0], "p3").state == pb.JOB_STATE_PAUSED
    assert resume(waiting, first.name, "r1").state == pb.JOB_STATE_QUEUED
    eventually(lambda: get(stub, first.name).queue.position == 1, 10, "its old place")
    error = refused(lambda: pause(waiting, others[1], "p3"), grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert "PauseJob" in error.details()

    model = first.spec.train.model.removeprefix("models/")
    assert others[0] in Shelf(waiting.home / "store").holders(model)
    assert cancel(waiting, others[0]).state == pb.JOB_STATE_CANCELLED
    assert others[0] not in Shelf(waiting.home / "store").holders(model)
    for call in (pause, resume):
        error = refused(lambda c=call: c(waiting, others[0], "x"), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
        assert "is CANCELLED; the call needs: QUEUED, PREPARING, RUNNING" in error.details()
        refused(lambda c=call: c(waiting, "jobs/none", "x"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        refused(lambda c=call: c(waiting, "none", ""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
