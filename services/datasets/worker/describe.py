"""The describe worker: loads every step, plug-ins too, and tells what they are.

Law of this room: it runs strangers' code, so it ends when it has told.
"""

from __future__ import annotations

import logging

from services.common.errors import worker_lost
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker.bound import Bench
from services.datasets.worker.steps.kinds import steps, told


def report() -> ingest_pb2.StepsReport:
    """Every step by name; WORKER_LOST that names each step which cannot be loaded."""
    found, broken = steps().all()
    if broken:
        raise worker_lost("the list of steps", "the step " + "; the step ".join(broken))
    return ingest_pb2.StepsReport(steps=[told(kind) for kind in found])


def main() -> None:
    logging.basicConfig()
    bench = Bench.open()
    with bench.refusing(lambda refusal: bench.send(ingest_pb2.StepsReport(refusal=refusal))):
        bench.send(report())


if __name__ == "__main__":
    main()
