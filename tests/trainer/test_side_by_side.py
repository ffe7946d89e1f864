"""Devices as slots, from outside: who waits, for what, and who runs beside whom."""

from __future__ import annotations

import pathlib

import grpc
import pytest

from qlorad.v1 import trainer_pb2 as pb
from services.common import devices
from tests.house import House, eventually, house
from tests.trainer.following import Follower
from tests.trainer.kit import create, get, small, stub_of
from tests.trainer.lawful import check_log
from tests.trainer.test_door import refused

RUNNING = pb.JOB_STATE_RUNNING


def cancel(made: House, name: str) -> None:
    stub_of(made).CancelJob(pb.CancelJobRequest(request_id=f"c-{name[5:]}", name=name), timeout=10)


def test_a_job_waits_for_space_and_for_whoever_holds_the_whole_device(small_home: pathlib.Path) -> None:
    """No worker starts here: first the disk is too full, then serving holds the processor of which these are shares."""
    engine = devices.acquire(small_home / "state" / "devices", "cpu", "inference/engine", 123)
    with house(small_home) as made:
        made.start("trainer", "--devices", "cpu:0,cpu:1", "--min-free-bytes", str(1 << 50))
        job = create(stub_of(made), small(), "wait", job_id="wait")
        place = eventually(lambda: _place(made, job.name), 10, "a place")
        assert place.reason == pb.QUEUE_REASON_DISK_FULL and not place.HasField("estimated_start")
        made.daemons["trainer"].stop()
        made.start("trainer", "--devices", "cpu:0,cpu:1", "--min-free-bytes", "0")
        place = eventually(
            lambda: (p := _place(made, job.name)) and p.reason == pb.QUEUE_REASON_DEVICE_BUSY and p, 10, "a reason"
        )
        assert (place.owner, place.owner_bytes) == ("inference/engine", 123)
        assert job.spec.train.threads >= 1
        cancel(made, job.name)
    engine.release()


def _place(made: House, name: str) -> pb.QueuePlace | None:
    job = get(stub_of(made), name)
    return job.queue if job.queue.position else None


def test_a_job_of_more_ranks_than_devices_is_refused(small_home: pathlib.Path) -> None:
    """On CUDA a rank takes a device; here a list of devices that this host does not have is refused at the start."""
    with house(small_home) as made, pytest.raises(AssertionError, match=r"--devices: got 'cuda:7'"):
        made.start("trainer", "--devices", "cuda:7")
    with house(small_home) as made, pytest.raises(AssertionError, match="whole or in shares"):
        made.start("trainer", "--devices", "cpu,cpu:0")


@pytest.mark.slow
def test_two_jobs_run_at_once_and_the_third_is_told_when(small_home: pathlib.Path) -> None:
    with house(small_home) as made:
        made.start("trainer", "--devices", "cpu:0,cpu:1", "--retry-backoff-seconds", "0")
        stub = stub_of(made)
        first = create(stub, small(4), "first", job_id="first")
        Follower(made, first.name).join()  # now it is known how long a job of this model takes

        spec = small(3000, evaluation__max_rows=1, checkpoints__every_steps=0)
        long = [create(stub, spec, f"l{n}", job_id=f"long{n}") for n in range(2)]
        followers = [Follower(made, job.name) for job in long]
        eventually(lambda: all(f.step() >= 3 for f in followers), 60, "both at work")
        jobs = [get(stub, job.name) for job in long]
        assert [j.state for j in jobs] == [RUNNING, RUNNING]
        used = {e.attempt_started.device for f in followers for e in list(f.events) if e.HasField("attempt_started")}
        assert used == {"cpu:0", "cpu:1"}
        for device in ("cpu:0", "cpu:1"):
            holder = devices.holder(small_home / "state" / "devices", device)
            assert holder is not None and holder[0] in {j.name for j in long}
        with pytest.raises(Exception, match="is held by jobs/long"):
            devices.acquire(small_home / "state" / "devices", "cpu", "inference/engine")

        low = create(stub, small(4), "low", job_id="low", priority=-5)
        high = create(stub, small(4), "high", job_id="high", priority=5)
        told = eventually(
            lambda: (p := get(stub, low.name).queue) and p.position == 2 and p.HasField("estimated_start") and p,
            30,
            "a start to be expected",
        )
        assert told.reason == pb.QUEUE_REASON_POSITION
        assert told.estimated_start.seconds >= get(stub, high.name).queue.estimated_start.seconds
        made.daemons["trainer"].kill()  # both workers go on, and hold their devices
        made.daemons["trainer"].start()
        stub = stub_of(made)
        reached = [f.step() for f in followers]
        eventually(lambda: all(f.step() > r for f, r in zip(followers, reached, strict=True)), 60, "further steps")
        assert get(stub, high.name).state == pb.JOB_STATE_QUEUED
        cancel(made, long[0].name)
        watch_high = Follower(made, high.name)
        watch_low = Follower(made, low.name)
        watch_high.join()
        watch_low.join()
        assert get(stub, long[1].name).state == RUNNING, "beside it two others have come and gone"
        cancel(made, long[1].name)
        for follower in followers:
            follower.join()
        begun = {
            f: next(e.time.ToNanoseconds() for e in f.events if e.HasField("attempt_started"))
            for f in (watch_high, watch_low)
        }
        assert begun[watch_high] < begun[watch_low], "priority"
        for job, follower in zip((*long, high, low), (*followers, watch_high, watch_low), strict=True):
            check_log(job, follower.events, get(stub, job.name))
        refused(lambda: get(stub, "jobs/none"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
