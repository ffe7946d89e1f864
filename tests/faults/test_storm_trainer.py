"""P3, P10, P11 of the trainer: random kills end in the same bytes, a stop keeps the work, SIGTERM loses nothing."""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from qlorad.v1 import trainer_pb2 as pb
from qlorad.v1 import trainer_pb2_grpc
from services.common.shelf import Shelf
from tests.house import clone_store, eventually, house
from tests.trainer.following import Follower, run_undisturbed
from tests.trainer.kit import create, get, small, stub_of, worker_of
from tests.trainer.lawful import check_log

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds workers by /proc")
EVERY = 4


def storm(home: pathlib.Path, calm_home: pathlib.Path, steps: int, kills: int, seed: int) -> None:
    """Kills of the worker, the daemon, or both, some random steps apart; then all is as if undisturbed."""
    draw = random.Random(seed)
    spec = small(steps, checkpoints__every_steps=EVERY, evaluation__max_rows=1, limits__max_attempts=1000)
    clone_store(home, calm_home)
    calm = run_undisturbed(calm_home, spec)
    assert calm.state == pb.JOB_STATE_SUCCEEDED, calm.error
    with house(home) as made:
        daemon = made.start("trainer", "--retry-backoff-seconds", "0")
        job = create(stub_of(made), spec, "storm", job_id="storm")
        follower = Follower(made, job.name)
        done = 0
        while done < kills:
            steps_seen = sum(e.HasField("step") for e in list(follower.events))
            wanted = steps_seen + draw.randint(1, 2 * EVERY)
            eventually(
                lambda wanted=wanted: (
                    sum(e.HasField("step") for e in list(follower.events)) >= wanted or not follower.alive()
                ),
                120,
                "further steps",
            )
            assert follower.alive(), f"it ended after {done} kills; it needs more steps"
            what = draw.choice(("worker", "daemon", "both"))
            if what != "daemon":
                try:
                    worker = worker_of(home, job.name)
                except AssertionError:
                    continue  # between two attempts
            if what != "worker":
                daemon.kill()
            if what != "daemon":
                os.kill(worker, signal.SIGKILL)
            if what != "worker":
                daemon.start()
            done += 1
        follower.join()
        ended = get(stub_of(made), job.name)
        check_log(job, follower.events, ended)
    assert ended.state == pb.JOB_STATE_SUCCEEDED, ended.error
    assert ended.result.adapter_digest == calm.result.adapter_digest and ended.result.tokens == calm.result.tokens
    begun = [e.attempt_started.from_step for e in follower.events if e.HasField("attempt_started")]
    for attempt, (start, onward) in enumerate(itertools.pairwise(begun), start=1):
        reached = max(
            (e.step.step for e in follower.events if e.HasField("step") and e.attempt == attempt), default=start
        )
        assert 0 <= reached - onward <= EVERY, f"attempt {attempt} lost {reached - onward} steps"


@pytest.mark.slow
def test_p3_twenty_random_kills_end_in_the_same_bytes(small_home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    storm(small_home, tmp_path / "calm", steps=400, kills=20, seed=1)


@pytest.mark.slow
def test_p10_a_stop_at_any_step_keeps_the_work(small_home: pathlib.Path) -> None:
    """Cancelled six times while it prepares or trains: what is sealed is whole, and its adapter can be used."""
    draw, shelf = random.Random(10), Shelf(small_home / "store")
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0")
        for number in range(6):
            name = f"stop{number}"
            job = create(stub_of(made), small(3000, checkpoints__every_steps=7), name, job_id=name)
            follower = Follower(made, job.name)
            at = draw.randint(0, 40)
            eventually(lambda at=at, f=follower: f.step() >= at and len(f.events) > 3, 60, f"step {at}")  # type: ignore[misc]
            stub_of(made).CancelJob(pb.CancelJobRequest(request_id=name, name=job.name), timeout=20)
            follower.join()
            done = get(stub_of(made), job.name)
            check_log(job, follower.events, done)
            assert done.state == pb.JOB_STATE_CANCELLED and done.attempt == 1
            if not done.result.steps:
                continue
            kept = stub_of(made).ListCheckpoints(pb.ListCheckpointsRequest(name=job.name), timeout=20).checkpoints
            assert kept[-1].step == done.result.steps == follower.step(), "the newest whole step"
            assert kept[-1].digest == done.result.checkpoint_digest
            shelf.open("checkpoints", kept[-1].digest, verify=True)
            request = pb.PublishCheckpointRequest(request_id=name, name=kept[-1].name, adapter=f"adapters/{name}")
            published = stub_of(made).PublishCheckpoint(request, timeout=20)
            usable(shelf, published.digest, job.spec.train.model)


def usable(shelf: Shelf, digest: str, model: str) -> None:
    """Whether readers of adapters take it: right tensors for its base, all finite."""
    from services.common.safetensors_header import read_model_headers
    from services.common.worker import adapter

    sealed = shelf.open("adapters", digest, verify=True)
    base = shelf.open("models", model.removeprefix("models/"))
    assert sealed.manifest.lineage.base_digest == base.digest
    adapter.check_adapter(sealed.payload, read_model_headers(base.payload))


@pytest.mark.slow
def test_p11_sigterm_under_load_finishes_what_is_short_and_loses_nothing(small_home: pathlib.Path) -> None:
    """Calls in flight are answered, or refused as UNAVAILABLE; the worker outlives its daemon and is found again."""
    with house(small_home) as made, ThreadPoolExecutor(8) as pool:
        daemon = made.start("trainer", "--retry-backoff-seconds", "0")
        job = create(stub_of(made), small(3000, evaluation__max_rows=1), "long", job_id="long")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 5, 60, "step 5")
        worker = worker_of(small_home, job.name)
        ending, codes, acknowledged = threading.Event(), list[grpc.StatusCode](), list[str]()

        def load(thread: int) -> None:
            with daemon.channel() as channel:
                stub = trainer_pb2_grpc.TrainerServiceStub(channel)
                for number in range(100_000):
                    if ending.is_set():
                        return
                    try:
                        name = f"s{thread}-{number}"
                        create(stub, small(1), name, job_id=name, priority=-1)
                        acknowledged.append(f"jobs/{name}")
                        stub.CancelJob(pb.CancelJobRequest(request_id=name, name=f"jobs/{name}"), timeout=20)
                        codes.append(grpc.StatusCode.OK)
                    except grpc.RpcError as e:
                        codes.append(e.code())
                        if e.code() != grpc.StatusCode.OK:
                            return

        running = [pool.submit(load, thread) for thread in range(8)]
        eventually(lambda: len(codes) >= 40, 60, "load")
        assert daemon.stop() == 0
        ending.set()
        for each in running:
            each.result(60)
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, set(codes)
        assert worker_of(small_home, job.name) == worker, "a worker outlives its daemon"
        daemon.start()
        stub = stub_of(made)
        for name in acknowledged:
            get(stub, name)
        reached = follower.step()
        eventually(lambda: follower.step() > reached, 60, "a further step")
        stub.CancelJob(pb.CancelJobRequest(request_id="c", name=job.name), timeout=20)
        follower.join()
        done = get(stub, job.name)
        check_log(job, follower.events, done)
        assert done.attempt == 1 and done.state == pb.JOB_STATE_CANCELLED
        for name in acknowledged:
            if not get(stub, name).is_terminal:
                stub.CancelJob(pb.CancelJobRequest(request_id=f"end-{name[5:]}", name=name), timeout=20)
        eventually(lambda: all(get(stub, n).is_terminal for n in acknowledged), 60, "the end of all")
