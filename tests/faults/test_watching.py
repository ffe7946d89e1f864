"""P13 and P14: a watch loses, doubles, reorders nothing; whoever watches badly harms nobody."""

from __future__ import annotations

import asyncio
import pathlib
import random
import signal
import subprocess
import sys
import threading

import grpc
import psutil
import pytest

from qlorad.v1 import trainer_pb2 as pb
from qlorad.v1 import trainer_pb2_grpc
from tests.house import ROOT, House, eventually, house
from tests.trainer.following import Follower
from tests.trainer.kit import create, get, metric, small, stub_of
from tests.trainer.lawful import check_log


class Restless(threading.Thread):
    """A watcher that hangs up after a few events, again and again, whatever happens."""

    def __init__(self, made: House, name: str, seed: int, most: int) -> None:
        super().__init__(daemon=True)
        self.events: list[pb.Event] = []
        self.attached = 0
        self._made, self._name, self._draw, self._most = made, name, random.Random(seed), most
        self.start()

    def run(self) -> None:
        ended = False
        while not ended:
            try:
                with self._made.daemons["trainer"].channel() as channel:
                    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
                    for _ in range(50):
                        ended = self._once(stub)
                        if ended:
                            return
            except (grpc.RpcError, OSError, ValueError):
                threading.Event().wait(0.02)

    def _once(self, stub: trainer_pb2_grpc.TrainerServiceStub) -> bool:
        """Whether the stream came to its own end."""
        after = self.events[-1].sequence if self.events else 0
        self.attached += 1
        stream = stub.WatchJob(pb.WatchJobRequest(name=self._name, after_sequence=after), timeout=170)
        left = self._draw.randint(0, self._most)
        for update in stream:
            if update.HasField("event"):
                self.events.append(update.event)
                left -= 1
            if left <= 0:
                stream.cancel()
                return False
        return True


def reconnects(home: pathlib.Path, watchers: int, wanted: int, kills: int, most: int) -> int:
    """Watchers that hang up and a daemon that dies, over one job: each sees the log. How often they attached."""
    with house(home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0", "--watch-ring-events", "16")
        spec = small(100_000, evaluation__max_rows=1, checkpoints__every_steps=50)
        job = create(stub_of(made), spec, "watched", job_id="watched")
        calm = Follower(made, job.name)
        restless = [Restless(made, job.name, seed, most) for seed in range(watchers)]
        for number in range(kills):
            goal = wanted * (number + 1) // (kills + 1)
            eventually(lambda goal=goal: sum(r.attached for r in restless) >= goal, 150, f"{goal} attachments")
            made.daemons["trainer"].kill()
            made.daemons["trainer"].start()
        eventually(lambda: sum(r.attached for r in restless) >= wanted, 150, f"{wanted} attachments")
        stub_of(made).CancelJob(pb.CancelJobRequest(request_id="c", name=job.name), timeout=20)
        calm.join()
        done = get(stub_of(made), job.name)
        for watcher in restless:
            watcher.join(150)
            assert not watcher.is_alive()
            check_log(job, watcher.events, done)
        check_log(job, calm.events, done)
        return sum(r.attached for r in restless)


@pytest.mark.slow
def test_p13_five_hundred_reconnects_over_deaths_see_the_log(small_home: pathlib.Path) -> None:
    assert reconnects(small_home, watchers=4, wanted=500, kills=4, most=6) >= 500


FROZEN = """
import sys, grpc
from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
channel = grpc.insecure_channel(sys.argv[1])
stub = trainer_pb2_grpc.TrainerServiceStub(channel)
streams = [stub.WatchJob(trainer_pb2.WatchJobRequest(name=sys.argv[2])) for _ in range(20)]
for stream in streams:
    next(stream)
print("ready", flush=True)
input()
"""


@pytest.mark.slow
def test_p14_frozen_watchers_cost_the_job_nothing_and_the_daemon_little(small_home: pathlib.Path) -> None:
    """Twenty watches in a stopped process: the job goes on, memory stays, and who wakes is told where to go on."""
    with house(small_home) as made:
        daemon = made.start("trainer")
        stub = stub_of(made)
        spec = small(100_000, evaluation__max_rows=1, checkpoints__every_steps=0)
        job = create(stub, spec, "frozen", job_id="frozen")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 20, 60, "step 20")
        told = daemon.told["address"]
        watcher = subprocess.Popen(
            [sys.executable, "-c", FROZEN, told, job.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        try:
            assert watcher.stdout is not None and watcher.stdout.readline() == b"ready\n"
            watcher.send_signal(signal.SIGSTOP)
            before, reached = psutil.Process(daemon.pid).memory_info().rss, follower.step()
            assert metric(made, "qlorad_job_watchers") == 21
            eventually(lambda: follower.step() >= reached + 1500, 170, "1500 further steps")
            grown = psutil.Process(daemon.pid).memory_info().rss - before
            assert grown < 32 << 20, f"{grown} bytes for twenty frozen watchers and 1500 events"
        finally:
            watcher.kill()
            watcher.communicate(timeout=30)
        eventually(lambda: metric(made, "qlorad_job_watchers") == 1, 60, "the end of their watches")
        stub.CancelJob(pb.CancelJobRequest(request_id="c", name=job.name), timeout=20)
        follower.join()
        check_log(job, follower.events, get(stub, job.name))


@pytest.mark.slow
def test_p14_a_thousand_watchers_all_see_the_end(small_home: pathlib.Path) -> None:
    with house(small_home) as made:
        made.start("trainer")
        job = create(stub_of(made), small(40, evaluation__max_rows=1), "many", job_id="many")
        address = made.daemons["trainer"].told["address"]

        async def watch(stub: trainer_pb2_grpc.TrainerServiceAsyncStub) -> list[int]:
            seen = []
            async for update in stub.WatchJob(pb.WatchJobRequest(name=job.name), timeout=170):
                if update.HasField("event"):
                    seen.append(update.event.sequence)
            return seen

        async def all_of_them() -> list[list[int]]:
            channels = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(10)]
            stubs = [trainer_pb2_grpc.TrainerServiceStub(c) for c in channels]
            found = await asyncio.gather(*(watch(stubs[n % 10]) for n in range(1000)))  # type: ignore[arg-type]
            for channel in channels:
                await channel.close()
            return found

        found = asyncio.run(all_of_them())
        done = get(stub_of(made), job.name)
    assert done.state == pb.JOB_STATE_SUCCEEDED, done.error
    assert len(found) == 1000 and all(seen == list(range(1, done.last_sequence + 1)) for seen in found)
