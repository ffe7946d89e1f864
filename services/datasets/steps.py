"""The steps there are, as a worker that loads plug-ins tells them.

Law of this room: the daemon loads no plug-in; it asks once for each set of
installed packages and keeps the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from importlib import metadata
from typing import TypeAlias

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.workers import Workers, fault_of

GROUP = "qlorad.steps"
Told: TypeAlias = list[datasets_pb2.StepKind]
Brought: TypeAlias = frozenset[tuple[str, str, str, str]]
"""Name, place, package and version of every step that a plug-in brings."""


def brought() -> Brought:
    """What is installed now; nothing is loaded."""
    return frozenset(
        (point.name, point.value, point.dist.name if point.dist else "", point.dist.version if point.dist else "")
        for point in metadata.entry_points(group=GROUP)
    )


class Steps:
    """What may stand in a pipeline."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._turn = asyncio.Lock()
        self._known: tuple[Brought, Told] | None = None

    async def list(self) -> Told:
        """Every step, by name; WORKER_LOST that names the plug-ins which cannot be loaded."""
        async with self._turn:
            now = await asyncio.to_thread(brought)
            if self._known is None or self._known[0] != now:
                self._known = now, await self._ask()
            return self._known[1]

    async def _ask(self) -> Told:
        async with contextlib.aclosing(self._workers.reports("describe", datasets_pb2.ListStepsRequest())) as frames:
            async for frame in frames:
                report = ingest_pb2.StepsReport.FromString(frame)
                if report.HasField("refusal"):
                    raise fault_of(report.refusal)
                return list(report.steps)
        raise AssertionError("reports end with a result or a fault")
