"""P1, P3, P7 and P13 of the trainer: kill -9 anything. Short forms; kills are at fixed steps, not by clock."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from qlorad.v1 import trainer_pb2
from services.common import devices
from services.common.shelf import Shelf
from tests.house import clone_store, eventually, house
from tests.trainer.following import Follower, patiently, run_undisturbed
from tests.trainer.kit import create, get, small, stub_of, worker_of
from tests.trainer.lawful import check_log

STEPS, EVERY = 120, 4


@pytest.mark.usefixtures("held")
def test_p1_an_acknowledged_job_survives_kill_9(small_home: pathlib.Path) -> None:
    acknowledged: set[str] = set()
    with house(small_home) as made, ThreadPoolExecutor(4) as pool:
        made.start("trainer", "--max-queue", "1000")
        ending = threading.Event()

        def storm(thread: int) -> None:
            for number in range(1000):
                if ending.is_set():
                    return
                name = f"s{thread}-{number}"
                patiently(made, lambda stub, n=name: create(stub, small(), n, job_id=n))
                acknowledged.add(f"jobs/{name}")

        running = [pool.submit(storm, thread) for thread in range(4)]
        for goal in (5, 15, 30):
            eventually(lambda goal=goal: len(acknowledged) >= goal, 60, f"{goal} jobs")
            made.daemons["trainer"].kill()
            made.daemons["trainer"].start()
        ending.set()
        for each in running:
            each.result(60)
        listed = set()
        token = ""
        while True:
            request = trainer_pb2.ListJobsRequest(page_size=1000, page_token=token)
            page = stub_of(made).ListJobs(request, timeout=20)
            listed |= {j.name for j in page.jobs}
            token = page.next_page_token
            if not token:
                break
    assert len(acknowledged) >= 30 and acknowledged <= listed


@pytest.mark.usefixtures("held")
def test_p7_fifty_creates_with_one_request_id_are_one_job(small_home: pathlib.Path) -> None:
    with house(small_home) as made, ThreadPoolExecutor(50) as pool:
        made.start("trainer")
        first = [pool.submit(patiently, made, lambda stub: create(stub, small(), "same")) for _ in range(25)]
        eventually(lambda: any(f.done() for f in first), 30, "a first answer")
        made.daemons["trainer"].kill()
        second = [pool.submit(patiently, made, lambda stub: create(stub, small(), "same")) for _ in range(25)]
        made.daemons["trainer"].start()
        answers = {f.result(60).SerializeToString(deterministic=True) for f in (*first, *second)}  # type: ignore[attr-defined]
        stub = stub_of(made)
        assert len(answers) == 1
        assert len(stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10).jobs) == 1
        with pytest.raises(grpc.RpcError) as caught:
            create(stub, small(steps=5), "same")
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds workers by /proc")
def test_p3_and_p13_kills_change_neither_the_adapter_nor_the_log(
    small_home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    spec = small(STEPS, checkpoints__every_steps=EVERY)
    other = tmp_path / "calm"
    clone_store(small_home, other)
    calm = run_undisturbed(other, spec)
    assert calm.state == trainer_pb2.JOB_STATE_SUCCEEDED, calm.error
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0")
        job = create(stub_of(made), spec, "storm", job_id="storm")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 10, 60, "step 10")
        os.kill(worker_of(small_home, job.name), signal.SIGKILL)
        eventually(
            lambda: any(e.attempt == 2 and e.HasField("planned") for e in list(follower.events)), 60, "attempt 2"
        )
        made.daemons["trainer"].kill()  # the worker goes on
        made.daemons["trainer"].start()
        reached = follower.step()
        eventually(lambda: follower.step() >= reached + 10, 60, "ten further steps")
        worker = worker_of(small_home, job.name)
        made.daemons["trainer"].kill()
        os.kill(worker, signal.SIGKILL)  # both are gone
        made.daemons["trainer"].start()
        follower.join()
        done = get(stub_of(made), job.name)
        events = follower.events
        assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED, done.error
        assert done.attempt == 3 and follower.attached >= 3
        check_log(job, events, done)
        assert done.result.adapter_digest == calm.result.adapter_digest
        assert done.result.tokens == calm.result.tokens and done.result.steps == STEPS
        losses: dict[int, set[float]] = {}
        for event in events:
            if event.HasField("step"):
                losses.setdefault(event.step.step, set()).add(event.step.loss)
        assert sorted(losses) == list(range(1, STEPS + 1)) and all(len(v) == 1 for v in losses.values())
        begun = [e.attempt_started.from_step for e in events if e.HasField("attempt_started")]
        for attempt in (1, 2):
            last = max(e.step.step for e in events if e.HasField("step") and e.attempt == attempt)
            assert 0 <= last - begun[attempt] <= EVERY, "no more than what lies between two checkpoints is lost"
        shelf = Shelf(small_home / "store")
        kept = [p.name for p in (shelf.root / "checkpoints").iterdir() if p.name != "aliases"]
        assert len(kept) == 2, "keep_last"
        assert done.result.checkpoint_digest.removeprefix("sha256:") in kept


@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds workers by /proc")
def test_cancel_keeps_the_work_and_sigterm_leaves_the_worker_running(small_home: pathlib.Path) -> None:
    with house(small_home) as made:
        made.start("trainer")
        job = create(stub_of(made), small(2000, checkpoints__every_steps=0), "long", job_id="long")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 2, 60, "step 2")
        worker = worker_of(small_home, job.name)
        assert made.daemons["trainer"].stop() == 0
        assert worker_of(small_home, job.name) == worker, "a worker outlives its daemon"
        assert Shelf(small_home / "store").holders(job.spec.train.model.removeprefix("models/")) == [job.name]
        busy = devices.holder(small_home / "state" / "devices", devices.devices_here()[0])
        assert busy is not None and busy[0] == job.name
        made.daemons["trainer"].start()
        reached = follower.step()
        eventually(lambda: follower.step() > reached, 60, "a further step")
        stub = stub_of(made)
        request = trainer_pb2.CancelJobRequest(request_id="c", name=job.name)
        assert stub.CancelJob(request, timeout=10).job.state == trainer_pb2.JOB_STATE_CANCELLING
        follower.join()
        done = get(stub, job.name)
        assert done.state == trainer_pb2.JOB_STATE_CANCELLED and done.attempt == 1
        kept = Shelf(small_home / "store").open("checkpoints", done.result.checkpoint_digest, verify=True)
        files = sorted(f.path for f in kept.manifest.files)
        assert files == [
            "adapter.json",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "optimizer-00001-of-00001.safetensors",
            "rng-00001-of-00001.safetensors",
            "state.json",
        ]
        check_log(job, follower.events, done)
        assert [e.checkpoint_sealed.step for e in follower.events if e.HasField("checkpoint_sealed")] == [
            done.result.steps
        ]
        freed = stub.DeleteJob(trainer_pb2.DeleteJobRequest(request_id="d", name=job.name), timeout=10).freed_bytes
        assert freed > 0 and not (small_home / "state" / "jobs" / "long").exists()
