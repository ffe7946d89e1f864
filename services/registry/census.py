"""Counts for metrics, taken when someone asks.

Law of this room: only looks, on the metrics thread; what vanishes meanwhile is
not counted.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, Histogram

from qlorad.v1 import registry_pb2
from services.common.artifacts import MANIFEST, PAYLOAD
from services.common.telemetry import Live

_SECONDS = (5, 10, 15, 20, 30, 60, 120, 180, 240, 480, 960)


@dataclass(frozen=True, slots=True)
class Starters:
    """What is measured of the making of starters."""

    seconds: Histogram
    loss: Gauge

    @classmethod
    def make(cls, registry: CollectorRegistry) -> Starters:
        return cls(
            Histogram(
                "qlorad_starter_seconds", "Seconds a starter took.", ("size",), registry=registry, buckets=_SECONDS
            ),
            Gauge("qlorad_starter_loss", "Training loss of the starter made last.", ("size",), registry=registry),
        )


def count(store: pathlib.Path, collection: str) -> int:
    """Sealed artifacts of a collection."""
    return sum(1 for _ in (store / collection).glob(f"*/{MANIFEST}"))


def size_bytes(store: pathlib.Path, collection: str) -> int:
    """Bytes of all payloads of a collection."""
    total = 0
    for artifact in (store / collection).glob("*"):
        for folder, _, files in os.walk(artifact / PAYLOAD):  # what is removed meanwhile is passed over
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.path.getsize(os.path.join(folder, name))
    return total


def gauges(store: pathlib.Path, under_way: Callable[[], dict[int, int]]) -> Live:
    """Gauges of the shelf; `under_way` counts models that are not READY, by state."""

    def states() -> list[tuple[tuple[str, ...], float]]:
        counts = {**under_way(), int(registry_pb2.MODEL_STATE_READY): count(store, "models")}
        return [((registry_pb2.ModelState.Name(s).removeprefix("MODEL_STATE_"),), n) for s, n in sorted(counts.items())]  # type: ignore[arg-type]

    live = Live()
    live.add("qlorad_models", "Models by state.", ("state",), states)
    live.add("qlorad_adapters", "Adapters on the shelf.", (), lambda: [((), count(store, "adapters"))])
    live.add(
        "qlorad_shelf_bytes",
        "Bytes on the shelf by collection.",
        ("collection",),
        lambda: [((c,), size_bytes(store, c)) for c in ("models", "adapters")],
    )
    return live
