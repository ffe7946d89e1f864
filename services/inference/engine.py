"""The engine as the daemon sees it: orders out, reports in.

Law of this room: holds no policy. `Engine` is all that the rest of the daemon
knows, so that another engine can stand behind it; `EngineProcess` is our own
worker. Every order ends: answered, refused, or lost with the process.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from services.common import frames, process
from services.common.devices import Lease
from services.common.errors import Fault, worker_lost
from services.common.frames.v1 import engine_pb2
from services.inference import wire

log = logging.getLogger("qlorad.inference")

Report = engine_pb2.EngineReport

Asked = engine_pb2.EngineSubmit | engine_pb2.EngineScore | engine_pb2.EngineRender
"""What a request asks an engine for; each can be cancelled."""

WORKER = "services.inference.worker.engine"

OnGauges = Callable[[engine_pb2.EngineGauges, engine_pb2.EngineGauges], None]
"""Told how an engine was, and how it is."""

_LOAD_SECONDS = 1800.0
_JOINED = 256
"""Tokens that come as one: log-probabilities of a long answer are more than a message may be."""
_LAST = ("ended", "scored", "rendered")
"""The last report of a request that was not refused."""


class Answers:
    """Reports of one request, in order; ends with its last report or a Fault.

    Never blocks the engine: max_tokens bounds what it holds. A reader that falls
    behind finds its tokens joined, in pieces that any client takes.
    """

    def __init__(self, witness: Callable[[Report], None]) -> None:
        self._witness = witness
        self._reports: collections.deque[Report] = collections.deque()
        self._fault: Fault | None = None
        self._news = asyncio.Event()

    def put(self, report: Report) -> None:
        """Adds a report; the witness sees it now, however late the reader is."""
        self._witness(report)
        last = self._reports[-1] if self._reports else None
        if last is not None and last.HasField("tokens") and report.HasField("tokens"):
            if len(last.tokens.ids) < _JOINED:
                last.tokens.ids.extend(report.tokens.ids)
                last.tokens.text += report.tokens.text
                last.tokens.log_probabilities.extend(report.tokens.log_probabilities)
                return
        self._reports.append(report)
        self._news.set()

    def fail(self, fault: Fault) -> None:
        """Ends with a fault, after what came before it."""
        self._fault = self._fault or fault
        self._news.set()

    async def next(self) -> Report:
        """The next report."""
        while not self._reports:
            if self._fault is not None:
                raise self._fault
            self._news.clear()
            await self._news.wait()
        return self._reports.popleft()


class Engine(Protocol):
    """One resident base with its adapters."""

    loaded: engine_pb2.EngineLoaded
    gauges: engine_pb2.EngineGauges
    """How it was after its last step."""

    @property
    def running(self) -> int:
        """Requests being answered; 0 within one token of the last cancel."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""

    async def load_adapter(self, order: engine_pb2.EngineLoadAdapter) -> engine_pb2.EngineAdapterLoaded:
        """Takes an adapter in, or REJECTED."""

    async def unload_adapter(self, digest: str) -> int:
        """Frees an adapter once nothing in flight uses it; bytes freed."""

    def submit(self, asked: Asked, witness: Callable[[Report], None]) -> tuple[int, Answers]:
        """Queues a request; its number, and what comes of it."""

    def cancel(self, call: int) -> None:
        """Stops a request; nothing if it has ended."""

    async def close(self) -> int:
        """Ends the engine; bytes given back."""


@dataclass(slots=True)
class EngineProcess:
    """Our engine worker. Made by `start`."""

    talk: process.Talk
    on_lost: Callable[[Fault], None]
    on_gauges: OnGauges
    loaded: engine_pb2.EngineLoaded = field(default_factory=engine_pb2.EngineLoaded)
    gauges: engine_pb2.EngineGauges = field(default_factory=engine_pb2.EngineGauges)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _orders: dict[int, asyncio.Future[Report]] = field(default_factory=dict)
    _requests: dict[int, Answers] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _closing: bool = False
    fault: Fault | None = None
    """Why it is gone, if it is."""
    _reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        lease: Lease,
        log: pathlib.Path,
        on_lost: Callable[[Fault], None],
        on_gauges: OnGauges,
        module: str = WORKER,
    ) -> EngineProcess:
        """Starts the worker, which gets ready for `load`.

        `on_lost` is called once if the process ends by itself, while it loads or
        later; `on_gauges` after each step, with what the step before told.
        """
        talk = await process.start_talk(module, log, ["--lease", str(lease.fd)], pass_fds=[lease.fd])
        engine = cls(talk, on_lost, on_gauges)
        engine._reading = asyncio.create_task(engine._read(), name="engine reports")
        return engine

    async def load(self, load: engine_pb2.EngineLoad) -> None:
        """Waits for its base; a Fault says why there is none. Does not close it then."""
        try:
            order = engine_pb2.EngineOrder(load=load)
            self.loaded = (await asyncio.wait_for(self._ask(order), _LOAD_SECONDS)).loaded
        except TimeoutError:
            raise worker_lost("the engine", f"it did not load in {_LOAD_SECONDS:.0f} s", retry_seconds=2.0) from None

    @property
    def pid(self) -> int:
        return self.talk.process.pid

    @property
    def running(self) -> int:
        return len(self._begun)

    @property
    def waiting(self) -> int:
        return len(self._requests) - len(self._begun)

    # orders

    async def load_adapter(self, order: engine_pb2.EngineLoadAdapter) -> engine_pb2.EngineAdapterLoaded:
        return (await self._ask(engine_pb2.EngineOrder(load_adapter=order))).adapter_loaded

    async def unload_adapter(self, digest: str) -> int:
        order = engine_pb2.EngineOrder(unload_adapter=engine_pb2.EngineUnloadAdapter(digest=digest))
        return (await self._ask(order)).adapter_unloaded.freed_bytes

    def submit(self, asked: Asked, witness: Callable[[Report], None]) -> tuple[int, Answers]:
        answers = Answers(witness)
        call = next(self._numbers)
        if self.fault is not None:
            answers.fail(self.fault)
            return call, answers
        self._requests[call] = answers
        self._send(_order_of(call, asked))
        return call, answers

    def cancel(self, call: int) -> None:
        if call in self._requests:
            self._send(engine_pb2.EngineOrder(call=call, cancel=engine_pb2.EngineCancel()))

    async def close(self) -> int:
        self._closing = True
        freed = await asyncio.to_thread(_memory_of, self.pid)
        await self.talk.close()
        if self._reading is not None:
            await self._reading
        return freed

    async def _ask(self, order: engine_pb2.EngineOrder) -> Report:
        if self.fault is not None:
            raise self.fault
        order.call = next(self._numbers)
        answer: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._orders[order.call] = answer
        try:
            self._send(order)
            return await answer
        finally:
            self._orders.pop(order.call, None)

    def _send(self, order: engine_pb2.EngineOrder) -> None:
        # Not awaited: orders are few (two a request, and requests are bounded), and the engine always reads.
        self.talk.writer.write(frames.pack(order.SerializeToString()))

    # reports

    async def _read(self) -> None:
        try:
            while (body := await self.talk.receive()) is not None:
                reports = engine_pb2.EngineReports.FromString(body)
                for report in reports.reports:
                    self._dispatch(report)
                if reports.HasField("gauges"):
                    before, self.gauges = self.gauges, reports.gauges
                    self.on_gauges(before, self.gauges)
        except Exception:  # without this nobody who waits would ever hear
            log.exception("a report of the engine could not be taken; it is ended")
        code = await self.talk.close()
        self._lose(worker_lost("the engine", process.exit_story(code), retry_seconds=2.0))

    def _dispatch(self, report: Report) -> None:
        refused = wire.unpack(report.refusal) if report.HasField("refusal") else None
        order = self._orders.get(report.call)
        if order is not None:
            if order.done():
                return
            if refused is not None:
                order.set_exception(refused)
            else:
                order.set_result(report)
            return
        answers = self._requests.get(report.call)
        if answers is None:
            return
        if report.HasField("begun"):
            self._begun.add(report.call)
        if refused is not None:
            answers.fail(refused)
        else:
            answers.put(report)
        if refused is not None or report.WhichOneof("report") in _LAST:
            self._drop(report.call)

    def _drop(self, call: int) -> None:
        self._requests.pop(call, None)
        self._begun.discard(call)

    def _lose(self, fault: Fault) -> None:
        self.fault = fault
        for order in self._orders.values():
            if not order.done():
                order.set_exception(fault)
        for call, answers in list(self._requests.items()):
            answers.fail(fault)
            self._drop(call)
        if not self._closing:
            self.on_lost(fault)


def _order_of(call: int, asked: Asked) -> engine_pb2.EngineOrder:
    if isinstance(asked, engine_pb2.EngineSubmit):
        return engine_pb2.EngineOrder(call=call, submit=asked)
    if isinstance(asked, engine_pb2.EngineScore):
        return engine_pb2.EngineOrder(call=call, score=asked)
    return engine_pb2.EngineOrder(call=call, render=asked)


def _memory_of(pid: int) -> int:
    """What a process holds of the host's memory; 0 if it is gone. Does not count a GPU's."""
    try:
        return int(psutil.Process(pid).memory_info().rss)  # type: ignore[no-untyped-call]
    except psutil.Error:
        return 0
