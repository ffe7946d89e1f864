"""Work that several callers may watch: one run a key, however many ask.

Law of this room: a run belongs to the daemon, not to who asked first; a watcher
that goes away ends nothing, and a slow one misses progress, never the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault

log = logging.getLogger("qlorad.datasets")
T = TypeVar("T")

Tell = Callable[[str, int, int], None]
MAX_RUNS = 64


class Run(Generic[T]):
    """One piece of work, its newest progress, and its end."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._progress: datasets_pb2.StageProgress | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[T] | None = None

    def begin(self, work: Callable[[Tell], Awaitable[T]], ended: Callable[[], None]) -> None:
        """Starts the work. A cancelled run ends as SHUTTING_DOWN."""

        async def go() -> T:
            try:
                return await work(self.tell)
            except asyncio.CancelledError:
                raise Fault(
                    errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down; call again", retry_seconds=2.0
                ) from None
            finally:
                ended()

        self._task = asyncio.create_task(go())
        self._task.add_done_callback(self._note)

    def _note(self, task: asyncio.Task[T]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Fault):
            log.error("a run failed", exc_info=error)

    def tell(self, stage: str, done: int, total: int) -> None:
        """Replaces the progress that watchers see."""
        self._progress = datasets_pb2.StageProgress(stage=stage, done=done, total=total)
        self._changed.set()
        self._changed = asyncio.Event()

    def cancel(self) -> None:
        """Asks the work to stop."""
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """Waits for the end, whatever it is."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def watch(self) -> AsyncGenerator[datasets_pb2.StageProgress | T, None]:
        """Progress as it comes, then the result; raises the run's fault."""
        assert self._task is not None
        seen: datasets_pb2.StageProgress | None = None
        while not self._task.done():
            changed = self._changed
            if self._progress is not None and self._progress is not seen:
                seen = self._progress
                yield seen
                continue
            waiting = asyncio.ensure_future(changed.wait())
            try:
                await asyncio.wait([self._task, waiting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
        yield self._task.result()


class Runs(Generic[T]):
    """Runs by key, bounded in number; `width` of them work at once."""

    def __init__(self, turn: asyncio.Semaphore) -> None:
        self._turn = turn
        self._runs: dict[str, Run[T]] = {}
        self._draining = False

    def get(self, key: str) -> Run[T] | None:
        """The run of a key, while it runs."""
        return self._runs.get(key)

    def begin(self, key: str, body: bytes, work: Callable[[Tell], Awaitable[T]]) -> Run[T]:
        """Starts a run; the key must be free. QUEUE_FULL above a bound."""
        if self._draining:
            raise Fault(errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down; call again", retry_seconds=2.0)
        if len(self._runs) >= MAX_RUNS:
            raise Fault(
                errors_pb2.REASON_QUEUE_FULL, f"{MAX_RUNS} runs wait already; call again later", retry_seconds=5.0
            )

        async def in_turn(tell: Tell) -> T:
            if self._turn.locked():
                tell("queued", 0, 0)
            async with self._turn:
                return await work(tell)

        run: Run[T] = Run(body)
        self._runs[key] = run
        run.begin(in_turn, lambda: self._forget(key))
        return run

    def _forget(self, key: str) -> None:
        self._runs.pop(key, None)

    def drain(self) -> None:
        """Stops every run; none begins any more."""
        self._draining = True
        for run in list(self._runs.values()):
            run.cancel()

    async def ended(self) -> None:
        """Waits until no run is left."""
        for run in list(self._runs.values()):
            await run.ended()
