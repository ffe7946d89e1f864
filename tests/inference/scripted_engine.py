"""An engine without a model: speaks the frames of the real one, in a process of its own, and starts at once.

A base takes 4 bytes a parameter (2 unless fp32 is asked for), an adapter likewise. A request is answered with
max_tokens tokens, one a step, each the first byte of the digest of what answers; where the prompt is the path of a
file, it makes one and waits until that file is gone. An adapter whose payload holds a file "bad" is refused; one
with a file "gate" beside its payload is held up until that is gone.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import select

from qlorad.v1 import inference_pb2
from services.common import facts, frames
from services.common.errors import rejected
from services.common.frames.v1 import engine_pb2
from services.inference import wire

Order, Report = engine_pb2.EngineOrder, engine_pb2.EngineReport
STEP = 0.002


class Scripted:
    """Orders in, reports out."""

    def __init__(self, line: frames.Line) -> None:
        self.line = line
        self.width = 2
        self.steps = 0
        self.base = ""
        self.adapters: dict[str, int] = {}
        self.rows: dict[int, engine_pb2.EngineSubmit] = {}
        self.left: dict[int, int] = {}
        self.later: list[Order] = []

    def send(self, *reports: Report) -> None:
        self.steps += any(report.HasField("tokens") for report in reports)
        gauges = engine_pb2.EngineGauges(
            rows=len(self.rows), on_device=sorted(self.adapters), step_tokens=1, step_seconds=0.002 * self.steps,
            cache_bytes=10 * len(self.rows), prefix_bytes=7, prefix_hit_tokens=2 * self.steps,
            prefix_miss_tokens=self.steps,
        )  # fmt: skip
        try:
            self.line.send(engine_pb2.EngineReports(reports=reports, gauges=gauges).SerializeToString())
        except BrokenPipeError:  # the daemon has let it go, as it does with one that begins while its base is unloaded
            os._exit(0)

    def run(self) -> None:
        while True:
            busy = self.rows or self.later
            while select.select([self.line.fileno()], [], [], STEP if busy else None)[0]:
                body = self.line.receive()
                if body is None:
                    os._exit(0)
                self.obey(Order.FromString(body))
                busy = self.rows or self.later
            for order in self.later[:]:
                if not self.gate(order.load_adapter.payload).exists():
                    self.later.remove(order)
                    self.take(order)
            for call in list(self.rows):
                self.step(call)

    def obey(self, order: Order) -> None:
        kind = order.WhichOneof("order")
        if kind == "load":
            self.load(order)
        elif kind == "load_adapter":
            self.later.append(order)
        elif kind == "unload_adapter":
            digest = order.unload_adapter.digest
            assert not any(row.adapter_digest == digest for row in self.rows.values()), "the daemon counts its requests"
            freed = engine_pb2.EngineAdapterUnloaded(freed_bytes=self.adapters.pop(digest))
            self.send(Report(call=order.call, adapter_unloaded=freed))
        elif kind == "submit":
            assert not order.submit.adapter_digest or order.submit.adapter_digest in self.adapters
            self.rows[order.call], self.left[order.call] = order.submit, order.submit.options.max_tokens
            self.send(
                Report(call=order.call, accepted=engine_pb2.EngineAccepted(prompt_tokens=1)),
                Report(call=order.call, begun=engine_pb2.EngineBegun()),
            )
        elif kind == "score":  # is read, and never done
            self.send(
                Report(call=order.call, accepted=engine_pb2.EngineAccepted(prompt_tokens=100)),
                Report(call=order.call, begun=engine_pb2.EngineBegun()),
            )
        elif kind == "cancel" and order.call in self.rows:
            del self.rows[order.call]
            self.send(Report(call=order.call, ended=engine_pb2.EngineEnded()))

    @staticmethod
    def gate(payload: str) -> pathlib.Path:
        """A file beside an adapter's payload that holds its loading up."""
        return pathlib.Path(payload).parent / "gate"

    def load(self, order: Order) -> None:
        told = facts.from_manifest(facts.ModelFacts, order.load.manifest)
        precision = order.load.precision or inference_pb2.PRECISION_BF16
        self.width = 4 if precision == inference_pb2.PRECISION_FP32 else 2
        self.base = order.load.manifest.digest
        loaded = engine_pb2.EngineLoaded(
            precision=precision, memory_bytes=told.parameters * self.width, context_tokens=told.context_tokens
        )
        self.send(Report(call=order.call, loaded=loaded))

    def take(self, order: Order) -> None:
        load = order.load_adapter
        if (pathlib.Path(load.payload) / "bad").exists():
            self.send(Report(call=order.call, refusal=wire.pack(rejected(load.name, "check 'effect': none"))))
            return
        told = facts.from_manifest(facts.AdapterFacts, load.manifest)
        self.adapters[load.manifest.digest] = told.parameters * self.width
        found = engine_pb2.EngineAdapterLoaded(
            memory_bytes=told.parameters * self.width, rank=told.rank, probe_effect=1.0
        )
        self.send(Report(call=order.call, adapter_loaded=found))

    def step(self, call: int) -> None:
        row = self.rows[call]
        digest = row.adapter_digest or self.base
        if self.left[call] < row.options.max_tokens and os.path.exists(row.prompt):
            return
        self.left[call] -= 1
        reports = [Report(call=call, tokens=engine_pb2.EngineTokens(ids=[int(digest[7:9], 16)], text="x"))]
        if not self.left[call]:
            del self.rows[call]
            ended = engine_pb2.EngineEnded(reason=inference_pb2.FINISH_REASON_LENGTH)
            reports.append(Report(call=call, ended=ended))
        self.send(*reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lease", type=int, required=True)
    Scripted(frames.Line(parser.parse_args().fd)).run()


if __name__ == "__main__":
    main()
