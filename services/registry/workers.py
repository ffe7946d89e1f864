"""Runs one order in one worker process.

Law of this room: a worker is started, listened to, and ended here, whatever
happens; it never outlives the call that started it. Holds no policy.
"""

from __future__ import annotations

import logging
import pathlib
import signal
from collections.abc import Callable

from services.common import process
from services.common.errors import Fault, rejected, worker_lost
from services.common.frames.v1 import shelf_pb2

log = logging.getLogger("qlorad.registry.workers")

Progress = Callable[[shelf_pb2.ShelfProgress], None]
MODULE = "services.registry.worker"


class Workers:
    """Starts workers of this daemon."""

    def __init__(self, log_file: pathlib.Path, limits: process.Limits) -> None:
        self._log = log_file
        self._limits = limits

    async def run(self, order: shelf_pb2.ShelfOrder, what: str, progress: Progress) -> shelf_pb2.ShelfDone:
        """The worker's findings; its refusal as a Fault, WORKER_LOST if it died."""
        strangers = order.WhichOneof("work") != "starter"
        talk = await process.start_talk(MODULE, self._log, limits=self._limits if strangers else process.Limits())
        log.info("worker %d begins: %s", talk.process.pid, what)
        try:
            await talk.send(order)
            while (body := await talk.receive()) is not None:
                report = shelf_pb2.ShelfReport.FromString(body)
                match report.WhichOneof("report"):
                    case "progress":
                        progress(report.progress)
                    case "done":
                        return report.done
                    case "refusal":
                        raise Fault(report.refusal.reason, report.refusal.message, resource=what)
        except ConnectionError:
            log.warning("worker %d closed the line", talk.process.pid)
        except BaseException:
            process.kill(talk.process.pid)
            raise
        finally:
            code = await talk.close()
        if code == -signal.SIGXCPU:
            raise rejected(what, f"takes more than {self._limits.cpu_seconds} CPU seconds to look at")
        log.error("worker %d was lost: %s", talk.process.pid, process.tail(self._log, 2000))
        raise worker_lost(f"the worker for {what}", process.exit_story(code))
