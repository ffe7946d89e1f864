"""The engine: one process that owns one base, its adapters, and the device.

Law of this room: the loop below is the only thread that touches the model. A
second thread only sorts orders, so that a cancel is heard at once; a third
renders and tokenises prompts, a fourth reads adapters' files, one by one. The
process holds the device's lease by an inherited file and ends at once when the
daemon's socket closes, so memory and device come back for certain.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from typing import NoReturn

from qlorad.v1 import errors_pb2
from services.common import frames, process
from services.common.errors import Fault, rejected
from services.common.frames.v1 import engine_pb2
from services.inference import wire

log = logging.getLogger("qlorad.engine")

_MOMENT = 0.02
"""Seconds that an engine without work waits at most for those who come together with the first."""
_LULL = 0.004
"""Seconds without anybody new after which nobody is waited for any more."""
_SPINS = "50000"

Order = engine_pb2.EngineOrder
Report = engine_pb2.EngineReport


class Out:
    """Reports on their way to the daemon, one frame a step. Any thread may send."""

    def __init__(self, line: frames.Line) -> None:
        self._line = line
        self._one_at_a_time = threading.Lock()

    def send(self, reports: list[Report], gauges: engine_pb2.EngineGauges | None = None) -> None:
        """Sends what there is; ends the process if the daemon is gone."""
        if not reports:
            return
        body = engine_pb2.EngineReports(reports=reports, gauges=gauges).SerializeToString()
        try:
            with self._one_at_a_time:
                self._line.send(body)
        except OSError:
            leave()
        except frames.BadFrame:
            # Scores of long texts can be too large together, or alone.
            if len(reports) > 1:
                for report in reports:
                    self.send([report])
            else:
                told = f"the answer takes {len(body)} bytes; accepted: a shorter text, or fewer alternatives"
                self.refuse(reports[0].call, Fault(errors_pb2.REASON_TOO_LARGE, told))

    def refuse(self, call: int, error: Exception) -> None:
        """Tells that an order is refused; an unexpected error goes to the log with its story."""
        if not isinstance(error, Fault):
            log.error("order %d failed", call, exc_info=error)
            error = rejected("the engine", f"{type(error).__name__}: {error}"[:500])
        self.send([Report(call=call, refusal=wire.pack(error))])


def leave() -> NoReturn:
    """Ends the process now, whatever its threads do."""
    os._exit(0)


class Engine:
    """Orders in, reports out, around one scheduler."""

    def __init__(self, line: frames.Line, load: Order) -> None:
        self._line = line
        self.out = Out(line)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._leaving: dict[str, int] = {}
        """Adapters that wait for their last row: digest and the order to answer."""
        self._to_read: queue.SimpleQueue = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        """Calls that were cancelled before they were read."""
        self._unread: set[int] = set()
        # Before the long load, so that a daemon that goes away meanwhile ends it.
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        self._load(load)

    def _load(self, order: Order) -> None:
        """Brings the base into memory."""
        begun = time.monotonic()
        try:
            from services.inference.worker import base

            self.base = base.bring(order.load)
        except Exception as e:
            self.out.refuse(order.call, e)
            raise SystemExit(1) from e
        threading.Thread(target=self._work, args=(self._to_read,), name="prompts", daemon=True).start()
        threading.Thread(target=self._work, args=(self._to_prepare,), name="adapters", daemon=True).start()
        self.out.send([Report(call=order.call, loaded=self.base.told(time.monotonic() - begun))])

    # the threads beside the loop

    def _listen(self) -> None:
        """Sorts orders; does nothing that takes time."""
        try:
            while (body := self._line.receive()) is not None:
                order = Order.FromString(body)
                kind = order.WhichOneof("order")
                if kind in ("submit", "score", "render"):
                    self._unread.add(order.call)
                    self._to_read.put(lambda order=order, kind=kind: self._read(order, kind))
                elif kind == "load_adapter":
                    self._to_prepare.put(lambda order=order: self._prepare(order))
                else:
                    if kind == "cancel" and order.call in self._unread:
                        self._cancelled.add(order.call)
                    self._inbox.put(order)
        finally:
            leave()

    @staticmethod
    def _work(jobs: queue.SimpleQueue) -> None:
        while True:
            jobs.get()()

    def _read(self, order: Order, kind: str) -> None:
        """Renders and tokenises; the loop then takes what came of it, unless it was cancelled meanwhile."""
        call, reader = order.call, self.base.reader
        try:
            if call in self._cancelled:
                pass
            elif kind == "render":
                self.out.send([Report(call=call, rendered=reader.rendered(order.render))])
            elif kind == "score":
                ids, counted = reader.scored(order.score)
                self._inbox.put(
                    lambda: self._take(call, lambda: self.base.submit_score(call, order.score, ids, counted))
                )
                return
            else:
                prompt = reader.prompt(order.submit)
                self._inbox.put(lambda: self._take(call, lambda: self.base.submit(call, order.submit, prompt)))
                return
        except Exception as e:
            self.out.refuse(call, e)
        self._inbox.put(lambda: self._take(call, list))

    def _prepare(self, order: Order) -> None:
        try:
            prepared = self.base.prepare(order.load_adapter)
        except Exception as e:
            self.out.refuse(order.call, e)
            return
        self._inbox.put(lambda: self._guard(order.call, lambda: [self.base.add(order.call, prepared)]))

    # the loop

    def run(self) -> None:
        """Serves for ever. What no request can be blamed for ends the process; the daemon tells all and starts anew."""
        try:
            self._serve()
        except BaseException:
            log.exception("the engine ends")
            os._exit(1)

    def _serve(self) -> None:
        while True:
            reports = [] if self.base.scheduler.has_work else self._gather()
            while not self._inbox.empty():
                reports += self._obey(self._inbox.get())
            reports += self.base.scheduler.step()
            reports += self._let_go()
            self.out.send(reports, self.base.scheduler.gauges())

    def _gather(self) -> list[Report]:
        """Waits for something to do, and then a moment for those who come together.

        Read in one step, sixteen prompts cost a tenth less than the first alone and the others behind it; and who is
        still being cut into tokens would have to share the interpreter with that step.
        """
        reports = self._obey(self._inbox.get())
        until = time.monotonic() + _MOMENT
        while self.base.scheduler.has_work and (left := until - time.monotonic()) > 0:
            try:
                reports += self._obey(self._inbox.get(timeout=left if self._unread else min(left, _LULL)))
            except queue.Empty:
                break
        return reports

    def _obey(self, item) -> list[Report]:
        """One order, or what another thread made of one."""
        return item() if callable(item) else self._order(item)

    def _order(self, order: Order) -> list[Report]:
        kind = order.WhichOneof("order")
        if kind == "cancel":
            if order.call not in self._unread:
                self._cancelled.discard(order.call)
            return self.base.scheduler.cancel(order.call)
        if kind == "unload_adapter":
            self._leaving[order.unload_adapter.digest] = order.call
        return []

    def _take(self, call: int, work) -> list[Report]:
        """A request that was read; one that was cancelled meanwhile only ends."""
        self._unread.discard(call)
        if call in self._cancelled:
            self._cancelled.discard(call)
            return [Report(call=call, ended=engine_pb2.EngineEnded())]
        return self._guard(call, work)

    def _guard(self, call: int, work) -> list[Report]:
        try:
            return work()
        except Exception as e:
            self.out.refuse(call, e)
            return []

    def _let_go(self) -> list[Report]:
        done = [d for d in self._leaving if not self.base.scheduler.uses(d)]
        return [
            Report(
                call=self._leaving.pop(digest),
                adapter_unloaded=engine_pb2.EngineAdapterUnloaded(freed_bytes=self.base.remove(digest)),
            )
            for digest in done
        ]


def spin_a_little() -> None:
    """Lets torch's threads wait awake between two products, for a millisecond or two, before they sleep.

    A token is hundreds of small products: waking up for each costs half as much again. Other workers have theirs
    sleep at once, since two processes whose threads wait awake stand in each other's way. Before torch is imported.
    """
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def bring_libraries() -> None:
    """Imports what a base needs. Whatever goes wrong goes wrong again for whom needs it, and is told there."""
    with contextlib.suppress(Exception):
        from services.inference.worker import base  # noqa: F401


def main() -> None:
    process.apply_limits()
    spin_a_little()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lease", type=int, required=True, help="held open for as long as this process lives")
    line = frames.Line(parser.parse_args().fd)
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # The libraries take seconds, and the daemon may still be reading the base's bytes.
    threading.Thread(target=bring_libraries, name="libraries", daemon=True).start()
    first = line.receive()
    if first is None:
        leave()
    Engine(line, Order.FromString(first)).run()


if __name__ == "__main__":
    main()
