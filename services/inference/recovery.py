"""Engines that were lost come back.

Law of this room: at once, then ever later, and not for ever; health says
NOT_SERVING from the loss until the last lost engine has its adapters again, or
is given up. What is given up stays wanted: a request tries anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.server import Health
from services.inference.life import Awake
from services.inference.metrics import Metrics

log = logging.getLogger("qlorad.inference")

SERVICE = "qlorad.v1.InferenceService"
_RESTARTS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each attempt."""


class Recovery:
    """Which bases are being brought back."""

    def __init__(self, bring: Callable[[str, str], Awaitable[Awake]], metrics: Metrics) -> None:
        self._bring = bring
        self._metrics = metrics
        self._health: Health | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ending = False

    def begin(self, health: Health) -> None:
        """From here on, losses are told to `health`."""
        self._health = health

    def __contains__(self, digest: str) -> bool:
        return digest in self._running

    def start(self, digest: str, name: str) -> None:
        """Brings a base back, unless that is under way or the daemon ends."""
        if not self._ending and digest not in self._running:
            self._running[digest] = asyncio.create_task(self._run(digest, name), name=f"recovery of {name}")

    async def give_up(self, digest: str) -> None:
        """Stops bringing a base back."""
        task = self._running.get(digest)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def end(self) -> None:
        """Brings nothing back any more."""
        self._ending = True
        for digest in list(self._running):
            await self.give_up(digest)

    async def _run(self, digest: str, name: str) -> None:
        assert self._health is not None
        try:
            await self._health.set(False, [SERVICE])
            for pause in _RESTARTS:
                await asyncio.sleep(pause)
                if await self._try(digest, name):
                    return
        finally:
            del self._running[digest]
            if not self._running and not self._ending:
                await self._health.set(True, [SERVICE])

    async def _try(self, digest: str, name: str) -> bool:
        """Whether there is no need to try again."""
        try:
            back = await self._bring(digest, name)
        except Fault as fault:
            log.warning("%s does not come back: %s", name, fault)
            return fault.reason != errors_pb2.REASON_WORKER_LOST
        if back.restoring is not None:
            await asyncio.wait([back.restoring])
        if back.lost is not None:
            return False
        self._metrics.restarts.inc()
        return True
