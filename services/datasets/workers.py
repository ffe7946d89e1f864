"""Starts this service's workers and turns what they say into results or faults.

Law of this room: a worker is closed whatever happens; one that dies is
WORKER_LOST with its story, one that hits a bound is TOO_LARGE with the bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from qlorad.v1 import errors_pb2
from services.common import process
from services.common.errors import Fault, Violation, worker_lost
from services.common.frames.v1 import ingest_pb2
from services.datasets.metrics import Metrics

_FRUGAL: Mapping[str, str] = {
    "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes address space
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # arrays go back to the system as soon as they are not needed
}


@dataclass(frozen=True, slots=True)
class Workers:
    """How workers are started here."""

    logs: pathlib.Path
    memory_bytes: int
    cpu_seconds: int
    metrics: Metrics

    async def reports(self, work: str, order: Message) -> AsyncGenerator[bytes, None]:
        """Every frame of a worker given an order; a fault if it goes away. Break off when enough was heard."""
        begun, outcome = time.monotonic(), "lost"
        self.metrics.workers.labels(work).inc()
        talk = None
        try:
            talk = await process.start_talk(
                f"services.datasets.worker.{work}",
                self.logs / f"datasets-{work}.log",
                environ=_FRUGAL,
                limits=process.Limits(self.memory_bytes, self.cpu_seconds),
            )
            with contextlib.suppress(ConnectionError):
                await talk.send(order)
            while (body := await talk.receive()) is not None:
                yield body
            code = await talk.close()
            raise self._story(work, code)
        except GeneratorExit:
            outcome = "done"
            raise
        finally:
            self.metrics.workers.labels(work).dec()
            self.metrics.worker_seconds.labels(work, outcome).observe(time.monotonic() - begun)
            if talk is not None:
                await asyncio.shield(asyncio.ensure_future(talk.close(1.0)))

    def _story(self, work: str, code: int) -> Fault:
        if code == -signal.SIGXCPU:
            told = f"the {work} worker took more than {self.cpu_seconds} CPU seconds"
            return Fault(errors_pb2.REASON_TOO_LARGE, f"{told}; accepted: less at a time, or a larger bound")
        return worker_lost(f"the {work} worker", process.exit_story(code))


def fault_of(refusal: ingest_pb2.WorkerRefusal) -> Fault:
    """A worker's refusal as the caller sees it."""
    return Fault(
        refusal.reason,
        refusal.message,
        violations=tuple(Violation(v.field, v.given, v.accepted) for v in refusal.violations),
        resource=refusal.resource,
        blockers=tuple((b.subject, b.description) for b in refusal.blockers),
        retry_seconds=refusal.retry_seconds or (30.0 if refusal.reason == errors_pb2.REASON_DISK_FULL else 0.0),
    )
