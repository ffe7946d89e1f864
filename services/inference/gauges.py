"""What is there now, read when Prometheus asks.

Law of this room: reads, changes nothing. The thread that serves metrics calls it,
so it copies what the event loop may change meanwhile.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from qlorad.v1 import inference_pb2
from services.common import telemetry
from services.inference.life import Awake
from services.inference.residency import Residency

Rows = list[tuple[tuple[str, ...], float]]
_STATES = [s for s in inference_pb2.AdapterState.values() if s not in (0, inference_pb2.ADAPTER_STATE_ABSENT)]


def gauges(residency: Residency) -> telemetry.Live:
    """The live series of the daemon."""

    def one(read: Callable[[], float]) -> telemetry.Read:
        return lambda: [((), float(read()))]

    def awake() -> list[Awake]:
        return list(residency.bases.awake.values())

    def adapters() -> Rows:
        count = collections.Counter(e.state for e in residency.roster.table.entries.values())
        return [((_short(state),), float(count[state])) for state in _STATES]

    def memory() -> Rows:
        held = [a.engine.gauges for a in awake()]
        return [
            (("weights",), float(sum(a.model.memory_bytes for a in awake()))),
            (("adapters",), float(sum(e.memory_bytes for e in residency.roster.table.entries.values()))),
            (("cache",), float(sum(g.cache_bytes for g in held))),
            (("prefix",), float(sum(g.prefix_bytes for g in held))),
        ]

    live = telemetry.Live()
    live.add(
        "qlorad_inference_requests_running", "Requests being answered.", (),
        one(lambda: sum(a.engine.running for a in awake())),
    )  # fmt: skip
    live.add(
        "qlorad_inference_requests_waiting", "Requests that wait for their turn.", (),
        one(lambda: sum(a.engine.waiting for a in awake())),
    )  # fmt: skip
    live.add("qlorad_inference_models_resident", "Bases in memory.", (), one(lambda: len(awake())))
    live.add("qlorad_inference_adapters", "Adapters by state and tier.", ("state",), adapters)
    live.add(
        "qlorad_inference_memory_bytes",
        "Bytes by kind: weights, adapters, keys and values of rows (cache) and of prompts seen before (prefix).",
        ("kind",), memory,
    )  # fmt: skip
    live.add(
        "qlorad_inference_batch_rows", "Rows in the batches of all engines.", (),
        one(lambda: sum(a.engine.gauges.rows for a in awake())),
    )  # fmt: skip
    live.add(
        "qlorad_inference_batch_waiting", "Requests that wait in the engines for a row.", (),
        one(lambda: sum(a.engine.gauges.waiting for a in awake())),
    )  # fmt: skip
    return live


def _short(state: inference_pb2.AdapterState.ValueType) -> str:
    return inference_pb2.AdapterState.Name(state).removeprefix("ADAPTER_STATE_").lower()
