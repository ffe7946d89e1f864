"""The describe worker: loads every objective, plug-ins too, and tells what they are.

Law of this room: it runs strangers' code, so it ends when it has told.
"""

from __future__ import annotations

import json
import logging
import sys

from qlorad.v1 import trainer_pb2
from services.common import frames, process
from services.common.frames.v1 import training_pb2
from services.trainer.worker.objectives.kinds import objectives


def report() -> training_pb2.ObjectivesReport:
    """Every objective by name, and what is wrong with those that cannot be loaded."""
    found, broken = objectives().all()
    told = [
        trainer_pb2.ObjectiveKind(
            name=kind.name,
            description=kind.description,
            package=kind.package,
            parameters_schema_json=json.dumps(kind.schema, ensure_ascii=False),
        )
        for kind in found
    ]
    return training_pb2.ObjectivesReport(objectives=told, broken=broken)


def main() -> None:
    logging.basicConfig()
    process.apply_limits()
    line = frames.Line(int(sys.argv[sys.argv.index("--fd") + 1]))
    line.send(report().SerializeToString())


if __name__ == "__main__":
    main()
