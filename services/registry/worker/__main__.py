"""The registry's worker: makes starters, looks at models and adapters from outside.

Law of this room: one order, one answer, then the end. Writes only in the staged
folder it was given; seals nothing. Ends at once when the daemon is gone.
"""

import argparse
import errno
import os
import pathlib
import sys
import threading
import time

from google.protobuf import struct_pb2

from qlorad.v1 import registry_pb2
from services.common import process
from services.common.errors import Fault, disk_full, rejected
from services.common.facts import to_facts
from services.common.frames import Line
from services.common.frames.v1 import shelf_pb2

_PROGRESS_SECONDS = 0.1
_COPY_BYTES = 4 << 20


class Reporter:
    """Sends progress now and then, and the result once."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._stage = ""
        self._last = 0.0

    def progress(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        """Tells where the work stands; beginnings and ends of a stage always, the rest at most ten times a second."""
        now = time.monotonic()
        if stage == self._stage and done != total and now - self._last < _PROGRESS_SECONDS:
            return
        self._stage, self._last = stage, now
        told = shelf_pb2.ShelfProgress(stage=stage, done=done, total=total, loss=loss)
        self.send(shelf_pb2.ShelfReport(progress=told))

    def refuse(self, fault: Fault) -> None:
        """Tells why there will be no result."""
        refusal = shelf_pb2.ShelfRefusal(reason=fault.reason, message=fault.message)
        self.send(shelf_pb2.ShelfReport(refusal=refusal))

    def send(self, report: shelf_pb2.ShelfReport) -> None:
        self._line.send(report.SerializeToString())


def make_starter(order: shelf_pb2.StarterWork, report: Reporter) -> tuple[dict, dict]:
    """Makes the model, then looks at it as at any other."""
    report.progress("load", 0, 1)
    from services.registry.worker import seal, starter

    recipe = starter.TEST if order.size == registry_pb2.STARTER_SIZE_TEST else starter.DEMO
    folder = pathlib.Path(order.folder)
    story = starter.make(recipe, folder, order.threads, report.progress)
    report.progress("inspect", 0, 1)
    return to_facts(seal.inspect(folder, "starter", starter.TEMPLATE_DATE)), story


def take_model(order: shelf_pb2.ModelWork, report: Reporter) -> tuple[dict, dict]:
    """Copies a folder's files aside, then looks at the copies."""
    folder = pathlib.Path(order.folder)
    total = sum(os.path.getsize(f.source) for f in order.files)
    done = 0
    for file in order.files:
        with open(file.source, "rb") as source, (folder / file.name).open("xb") as target:
            while chunk := source.read(_COPY_BYTES):
                target.write(chunk)
                done += len(chunk)
                report.progress("copy", done, max(total, done))
    report.progress("inspect", 0, 1)
    from services.registry.worker import seal

    return to_facts(seal.inspect(folder, order.name, order.template_date)), {}


def take_adapter(order: shelf_pb2.AdapterWork, report: Reporter) -> tuple[dict, dict]:
    """Looks at a received adapter and rewrites it canonically."""
    from services.registry.worker import adapter

    return to_facts(adapter.take(order)), {}


def work(order: shelf_pb2.ShelfOrder, report: Reporter) -> tuple[dict, dict]:
    """Does what was ordered; facts and story."""
    match order.WhichOneof("work"):
        case "starter":
            return make_starter(order.starter, report)
        case "model":
            return take_model(order.model, report)
        case "adapter":
            return take_adapter(order.adapter, report)
        case other:
            raise ValueError(f"unknown order {other!r}")


def struct(values: dict) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(values)
    return made


def watch(line: Line) -> None:
    """Ends this process when the daemon closes the line: nobody waits for the result then."""
    while line.receive() is not None:
        pass
    os._exit(3)


def main() -> None:
    process.apply_limits()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    line = Line(parser.parse_args().fd)
    body = line.receive()
    if body is None:
        sys.exit(3)
    order = shelf_pb2.ShelfOrder.FromString(body)
    threading.Thread(target=watch, args=(line,), daemon=True).start()
    report = Reporter(line)
    try:
        facts, story = work(order, report)
    except Fault as fault:
        report.refuse(fault)
    except MemoryError:
        report.refuse(rejected("the files", "need more memory to look at than worker_memory_bytes allows"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        report.refuse(disk_full("writing the staged files"))
    else:
        done = shelf_pb2.ShelfDone(facts=struct(facts), story=struct(story))
        report.send(shelf_pb2.ShelfReport(done=done))


if __name__ == "__main__":
    main()
