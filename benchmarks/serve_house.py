"""The daemon under measurement, and a loop to talk to it.

Law of this room: one daemon at a time, in a state of its own; the store is the home's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks import daemons
from benchmarks.serve_home import MODEL
from benchmarks.serve_load import Stub

import grpc  # isort: skip  (serve_home sets what it reads)
import psutil

from qlorad.v1 import inference_pb2

T = TypeVar("T")
RESIDENT = (
    inference_pb2.ADAPTER_STATE_UNSPECIFIED, inference_pb2.ADAPTER_STATE_HOST, inference_pb2.ADAPTER_STATE_DEVICE,
)  # fmt: skip
ALWAYS = ("--device", "cpu", "--idle-unload-seconds", "0")


@dataclass(slots=True)
class Served:
    """A running daemon as its users see it."""

    home: pathlib.Path
    pid: int
    stub: Stub
    _runner: asyncio.Runner
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs what talks to the daemon."""
        return self._runner.run(work)

    def load(self, precision: str = "bf16", model: str = MODEL) -> tuple[inference_pb2.LoadedModel, float]:
        """Brings a base into memory; what the daemon says of it, and how long the call took."""
        wanted = inference_pb2.Precision.Value(f"PRECISION_{precision.upper()}")
        request = inference_pb2.LoadModelRequest(model=f"models/{model}", precision=wanted, request_id=self._id())
        begun = time.perf_counter()
        told = self._call(self.stub.LoadModel, request).model
        return told, time.perf_counter() - begun

    def unload(self, model: str = MODEL) -> None:
        """Frees a base."""
        request = inference_pb2.UnloadModelRequest(model=f"models/{model}", request_id=self._id())
        self._call(self.stub.UnloadModel, request)

    def load_adapter(self, name: str) -> float:
        """Brings an adapter into memory; how long the call took."""
        request = inference_pb2.LoadAdapterRequest(adapter=f"adapters/{name}", request_id=self._id())
        begun = time.perf_counter()
        self._call(self.stub.LoadAdapter, request)
        return time.perf_counter() - begun

    def unload_adapter(self, name: str) -> None:
        """Frees an adapter."""
        request = inference_pb2.UnloadAdapterRequest(adapter=f"adapters/{name}", request_id=self._id())
        self._call(self.stub.UnloadAdapter, request)

    async def resident(self) -> set[str]:
        """Names of the adapters in memory."""
        told = await self.stub.ListAdapters(inference_pb2.ListAdaptersRequest())
        return {a.adapter.removeprefix("adapters/") for a in told.adapters if a.state in RESIDENT}

    def engine(self) -> psutil.Process:
        """The process that computes."""
        (found,) = [p for p in self.process().children() if "services.inference.worker.engine" in p.cmdline()]
        return found

    def process(self) -> psutil.Process:
        """The daemon itself."""
        return psutil.Process(self.pid)

    def _id(self) -> str:
        return f"bench-{next(self._numbers)}"

    def _call(self, method: Any, request: Any) -> Any:
        async def call() -> Any:
            return await method(request, timeout=600)

        return self.run(call())


@contextlib.contextmanager
def serving(
    home: pathlib.Path,
    adapters: Sequence[str] = (),
    precision: str = "bf16",
    flags: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """A fresh daemon with the base and adapters in memory; `precision` empty = none is loaded."""
    shutil.rmtree(home / "state", ignore_errors=True)
    with daemons.running("inference", home, [*ALWAYS, *flags], environ) as process, asyncio.Runner() as runner:

        async def connect() -> grpc.aio.Channel:
            return grpc.aio.insecure_channel(daemons.address("inference", home))

        channel = runner.run(connect())
        served = Served(home, process.pid, Stub(channel), runner)
        try:
            if precision:
                served.load(precision)
            for name in adapters:
                served.load_adapter(name)
            yield served
        finally:
            runner.run(channel.close())


def pin(process: psutil.Process, core: int) -> None:
    """Keeps a process, all its threads, on one core."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})
