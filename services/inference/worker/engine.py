"""The engine: one process that owns one base, its adapters, and the device.

Law of this room: the loop below is the only thread that touches the model. A
second thread reads orders, and renders and tokenises prompts; a third reads an
adapter's files while the loop goes on. The process holds the device's lease by
an inherited file and ends at once when the daemon's socket closes, so memory
and device come back for certain.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import threading
import time

from services.common import frames, process
from services.common.errors import Fault, rejected
from services.common.frames.v1 import engine_pb2
from services.inference import wire

log = logging.getLogger("qlorad.engine")

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

    def refuse(self, call: int, error: Exception) -> None:
        """Tells that an order is refused; an unexpected error goes to the log with its story."""
        if not isinstance(error, Fault):
            log.error("order %d failed", call, exc_info=error)
            error = rejected("the engine", f"{type(error).__name__}: {error}"[:500])
        self.send([Report(call=call, refusal=wire.pack(error))])


def leave() -> None:
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
        # Before the long load, so that a daemon that goes away meanwhile ends it.
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        self._load(load)

    def _load(self, order: Order) -> None:
        """Brings the base into memory; imports torch only here, while the daemon already listens."""
        begun = time.monotonic()
        try:
            from services.inference.worker import base

            self.base = base.bring(order.load)
        except Exception as e:
            self.out.refuse(order.call, e)
            raise SystemExit(1) from e
        self.out.send([Report(call=order.call, loaded=self.base.told(time.monotonic() - begun))])

    # the reading thread

    def _listen(self) -> None:
        try:
            while (body := self._line.receive()) is not None:
                order = Order.FromString(body)
                read = {"submit": self._read, "score": self._read_score, "render": self._render}
                kind = order.WhichOneof("order")
                self._inbox.put(read[kind](order) if kind in read else order)
        finally:
            leave()

    def _read(self, order: Order):
        """Renders and tokenises beside the loop; what the loop then does with it."""
        try:
            ids = self.base.reader.prompt(order.submit)
        except Exception as e:
            self.out.refuse(order.call, e)
            return list
        return lambda: self._guard(order.call, lambda: self.base.submit(order.call, order.submit, ids))

    def _read_score(self, order: Order):
        try:
            ids, counted = self.base.reader.scored(order.score)
        except Exception as e:
            self.out.refuse(order.call, e)
            return list
        return lambda: self._guard(order.call, lambda: self.base.submit_score(order.call, order.score, ids, counted))

    def _render(self, order: Order):
        try:
            rendered = self.base.reader.rendered(order.render)
        except Exception as e:
            self.out.refuse(order.call, e)
            return list
        self.out.send([Report(call=order.call, rendered=rendered)])
        return list

    # the loop

    def run(self) -> None:
        """Serves for ever."""
        while True:
            reports: list[Report] = []
            idle = not self.base.scheduler.has_work
            while idle or not self._inbox.empty():
                reports += self._obey(self._inbox.get())
                idle = False
            reports += self.base.scheduler.step()
            reports += self._let_go()
            self.out.send(reports, self.base.scheduler.gauges())

    def _obey(self, item) -> list[Report]:
        """One order, or what another thread made of one."""
        return item() if callable(item) else self._order(item)

    def _order(self, order: Order) -> list[Report]:
        kind = order.WhichOneof("order")
        if kind == "cancel":
            return self.base.scheduler.cancel(order.call)
        if kind == "load_adapter":
            self._prepare(order)
        elif kind == "unload_adapter":
            self._leaving[order.unload_adapter.digest] = order.call
        return []

    def _guard(self, call: int, work) -> list[Report]:
        try:
            return work()
        except Exception as e:
            self.out.refuse(call, e)
            return []

    def _prepare(self, order: Order) -> None:
        def beside() -> None:
            try:
                prepared = self.base.prepare(order.load_adapter)
            except Exception as e:
                self.out.refuse(order.call, e)
                return
            self._inbox.put(lambda: self._guard(order.call, lambda: [self.base.add(order.call, prepared)]))

        threading.Thread(target=beside, name="adapter", daemon=True).start()

    def _let_go(self) -> list[Report]:
        done = [d for d in self._leaving if not self.base.scheduler.uses(d)]
        return [
            Report(
                call=self._leaving.pop(digest),
                adapter_unloaded=engine_pb2.EngineAdapterUnloaded(freed_bytes=self.base.lora.remove(digest)),
            )
            for digest in done
        ]


def main() -> None:
    process.apply_limits()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lease", type=int, required=True, help="held open for as long as this process lives")
    line = frames.Line(parser.parse_args().fd)
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    first = line.receive()
    if first is None:
        return
    Engine(line, Order.FromString(first)).run()


if __name__ == "__main__":
    main()
