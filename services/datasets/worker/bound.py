"""What both workers of this service share: limits, the line to the daemon, refusals.

Law of this room: a worker ends when its daemon does; what a caller may see goes
over the line as a refusal, anything else kills the worker and stands in its log.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from qlorad.v1 import errors_pb2
from services.common import frames, process
from services.common.errors import Fault, disk_full
from services.common.frames.v1 import ingest_pb2

_STACK_BYTES = 1 << 20
"""Of a thread: the usual eight are much of what a worker may take."""


class Refused(Exception):
    """The order is refused."""

    def __init__(self, refusal: ingest_pb2.WorkerRefusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refusal_of(fault: Fault) -> ingest_pb2.WorkerRefusal:
    """A fault as it crosses the line."""
    refusal = ingest_pb2.WorkerRefusal(
        reason=fault.reason, message=fault.message, resource=fault.resource, retry_seconds=fault.retry_seconds
    )
    for v in fault.violations:
        refusal.violations.add(field=v.field, given=v.given, accepted=v.accepted)
    for subject, why in fault.blockers:
        refusal.blockers.add(subject=subject, description=why)
    return refusal


@dataclass(frozen=True, slots=True)
class Bench:
    """A worker at its place: the line, and the order that it was given."""

    line: frames.Line
    order: bytes

    @classmethod
    def open(cls, is_watched: bool = True) -> Bench:
        """Bounds this process, takes the order, and watches the other end from a thread; a worker of many orders
        listens to it anyway.
        """
        process.apply_limits()
        threading.stack_size(_STACK_BYTES)
        line = frames.Line(int(sys.argv[sys.argv.index("--fd") + 1]))
        order = line.receive()
        if order is None:
            os._exit(0)

        def watch() -> None:
            while line.receive() is not None:
                pass
            os._exit(0)

        if is_watched:
            threading.Thread(target=watch, daemon=True, name="daemon-watch").start()
        return cls(line, order)

    def send(self, message: Message) -> None:
        """Sends a report."""
        self.line.send(message.SerializeToString())

    @contextlib.contextmanager
    def refusing(self, send: Callable[[ingest_pb2.WorkerRefusal], None]) -> Iterator[None]:
        """Sends what a caller may see; a daemon that went away meanwhile ends the worker."""
        try:
            yield
        except Refused as e:
            send(e.refusal)
        except Fault as e:
            send(refusal_of(e))
        except BrokenPipeError:
            os._exit(0)
        except MemoryError:
            bound = resource.getrlimit(resource.RLIMIT_AS)[0]
            told = f"the work needs more memory than the {bound} bytes that its worker may take"
            send(ingest_pb2.WorkerRefusal(reason=errors_pb2.REASON_TOO_LARGE, message=told))
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            send(refusal_of(disk_full("writing rows")))
