"""The steps there are, as a worker that loads plug-ins tells them.

Law of this room: the daemon loads no plug-in; it asks once for each set of
installed packages and keeps the answer.
"""

from __future__ import annotations

import contextlib

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.workers import Workers


class Steps:
    """What may stand in a pipeline."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def list(self) -> list[datasets_pb2.StepKind]:
        """Every step, by name; WORKER_LOST where a plug-in cannot be loaded."""
        async with contextlib.aclosing(self._workers.reports("describe", datasets_pb2.ListStepsRequest())) as frames:
            async for frame in frames:
                return list(ingest_pb2.StepsReport.FromString(frame).steps)
        raise AssertionError("reports end with a result or a fault")
