"""The training worker: `python -m services.trainer.worker.train --attempt FOLDER --hold FDS`.

Law of this room: holds the inherited locks by merely living. Tells that it began
before it imports anything heavy, and how it ended before it ends; whoever kills
it leaves no ending, which means: try again.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import traceback
import warnings

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common import process, telemetry
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.trainer import launch
from services.trainer.worker.facts import Cancelled, Teller

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "DefaultCPUAllocator")
_NO_SPACE = ("No space left on device", "Disk quota exceeded")
"""As safetensors tells it, whose errors carry no number."""
_WORDS = {
    errors_pb2.REASON_INVALID_REQUEST: "BAD_DATA",
    errors_pb2.REASON_NOT_FOUND: "BAD_DATA",
    errors_pb2.REASON_CORRUPT: "REJECTED",
    errors_pb2.REASON_REJECTED: "REJECTED",
    errors_pb2.REASON_DISK_FULL: "DISK_FULL",
}
_OWN = {
    "BadData": "BAD_DATA",
    "AllMasked": "BAD_DATA",
    "NotFinite": "NOT_FINITE",
    "OverBudget": "OUT_OF_MEMORY",
    "Spike": "SPIKE",
    "NotTheLedger": "NOT_THE_LEDGER",
    "ObjectiveFailed": "OBJECTIVE_FAILED",
}


def read_arguments() -> tuple[pathlib.Path, training_pb2.Order, str]:
    """The attempt's folder, its order, and the held descriptors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempt", type=pathlib.Path, required=True)
    parser.add_argument("--hold", default="")
    given = parser.parse_args()
    order = training_pb2.Order.FromString((given.attempt / launch.ORDER).read_bytes())
    return given.attempt, order, given.hold


def error_of(error: BaseException) -> trainer_pb2.JobError:
    """An exception as the job's error: a word to decide by, and a sentence."""
    kind, text = type(error).__name__, telemetry.redact(str(error))
    if isinstance(error, Fault):
        return trainer_pb2.JobError(reason=_WORDS.get(error.reason, "INTERNAL"), message=text)
    if kind in _OWN:
        return trainer_pb2.JobError(reason=_OWN[kind], message=text)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(w in text for w in _NO_MEMORY):
        advice = "; try a smaller data.micro_batch_tokens, or quantization nf4"
        return trainer_pb2.JobError(reason="OUT_OF_MEMORY", message=f"out of memory: {text[:400]}{advice}")
    if (isinstance(error, OSError) and error.errno in (28, 122)) or any(w in text for w in _NO_SPACE):
        return trainer_pb2.JobError(reason="DISK_FULL", message="no space left on the disk while training")
    return trainer_pb2.JobError(reason="INTERNAL", message=f"{kind}: {text[:1000]}")


def run(order: training_pb2.Order, teller: Teller) -> int:
    """Trains, and tells how it ended."""
    warnings.filterwarnings("ignore")  # of libraries; what matters is told as facts
    try:
        from services.common.worker.libraries import spare_the_compiler

        spare_the_compiler()
        from services.trainer.worker import recipe

        recipe.train(order, teller)
    except Cancelled:
        teller.tell(training_pb2.Fact(stopped=training_pb2.Stopped()))
    except Exception as error:
        traceback.print_exc()
        teller.last_word(training_pb2.Fact(failed=error_of(error)))
        return 1
    return 0


def main() -> None:
    process.apply_limits()
    attempt, order, _ = read_arguments()
    teller = Teller(attempt, heartbeat_seconds=order.heartbeat_seconds)
    teller.tell(training_pb2.Fact(started=training_pb2.WorkerStarted(pid=os.getpid())))
    code = run(order, teller)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is told and synced; libraries' farewells take seconds


if __name__ == "__main__":
    main()
