"""The objectives there are.

Law of this room: a worker tells them; nothing of them is loaded here.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qlorad.v1 import trainer_pb2
from services.common import process
from services.common.brought import Listing
from services.common.errors import worker_lost
from services.common.frames.v1 import training_pb2

GROUP = "qlorad.objectives"


def objectives_of(logs: pathlib.Path) -> Listing[trainer_pb2.ObjectiveKind]:
    """What a job may learn; WORKER_LOST that names the plug-ins which cannot be loaded."""

    async def ask() -> list[trainer_pb2.ObjectiveKind]:
        talk = await process.start_talk("services.trainer.worker.describe", logs / "trainer-describe.log")
        try:
            body = await talk.receive()
        finally:
            code = await talk.close()
        if body is None:
            raise worker_lost("the describe worker", process.exit_story(code))
        report = training_pb2.ObjectivesReport.FromString(body)
        if report.broken:
            raise worker_lost("the list of objectives", "the objective " + "; the objective ".join(report.broken))
        return list(report.objectives)

    return Listing(GROUP, ask)


def schemas(kinds: list[trainer_pb2.ObjectiveKind]) -> Mapping[str, Mapping[str, Any]]:
    """The schema of each one's parameters, by name."""
    return {kind.name: json.loads(kind.parameters_schema_json) for kind in kinds}
