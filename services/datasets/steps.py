"""The steps there are.

Law of this room: a worker tells them; nothing of them is loaded here.
"""

from __future__ import annotations

import contextlib

from qlorad.v1 import datasets_pb2
from services.common.brought import Listing
from services.common.frames.v1 import ingest_pb2
from services.datasets.workers import Workers, fault_of

GROUP = "qlorad.steps"


def steps_of(workers: Workers) -> Listing[datasets_pb2.StepKind]:
    """What may stand in a pipeline; WORKER_LOST that names the plug-ins which cannot be loaded."""

    async def ask() -> list[datasets_pb2.StepKind]:
        async with contextlib.aclosing(workers.reports("describe", datasets_pb2.ListStepsRequest())) as frames:
            async for frame in frames:
                report = ingest_pb2.StepsReport.FromString(frame)
                if report.HasField("refusal"):
                    raise fault_of(report.refusal)
                return list(report.steps)
        raise AssertionError("reports end with a result or a fault")

    return Listing(GROUP, ask)
