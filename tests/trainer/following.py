"""Callers that outlive the daemon: one that asks until it is answered, one that watches a job to its end."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable

import grpc

from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
from tests.house import House, eventually, house
from tests.trainer.kit import create, get, stub_of


def patiently(made: House, call: Callable[[trainer_pb2_grpc.TrainerServiceStub], object]) -> object:
    """Calls until the daemon answers, over its deaths."""

    def once() -> tuple[object] | None:
        try:
            with made.daemons["trainer"].channel() as channel:
                return (call(trainer_pb2_grpc.TrainerServiceStub(channel)),)
        except (grpc.RpcError, OSError, ValueError) as e:
            if isinstance(e, grpc.RpcError) and e.code() not in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.CANCELLED,
            ):
                raise
            return None  # down; its address file may be gone or half of the old one

    return eventually(once, 60, "an answer")[0]


class Follower:
    """A watcher that re-attaches from the last number it saw."""

    def __init__(self, made: House, name: str) -> None:
        self.events: list[trainer_pb2.Event] = []
        self.attached = 0
        self._made, self._name = made, name
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while True:
            try:
                with self._made.daemons["trainer"].channel() as channel:
                    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
                    after = self.events[-1].sequence if self.events else 0
                    request = trainer_pb2.WatchJobRequest(name=self._name, after_sequence=after)
                    self.attached += 1
                    for update in stub.WatchJob(request, timeout=170):
                        if update.HasField("event"):
                            self.events.append(update.event)
                    return
            except (grpc.RpcError, OSError, ValueError):
                threading.Event().wait(0.05)

    def step(self) -> int:
        """The newest step seen."""
        return max((e.step.step for e in list(self.events) if e.HasField("step")), default=0)

    def alive(self) -> bool:
        """Whether the job has not ended yet, as far as it was told."""
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(170)
        assert not self._thread.is_alive()


def run_undisturbed(home: pathlib.Path, spec: trainer_pb2.JobSpec) -> trainer_pb2.Job:
    with house(home) as made:
        made.start("trainer")
        stub = stub_of(made)
        job = create(stub, spec, "calm", job_id="calm")
        follower = Follower(made, job.name)
        follower.join()
        return get(stub, job.name)
