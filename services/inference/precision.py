"""How a base is held when the caller leaves it to the daemon.

Law of this room: pure; sizes and what the device can do in, a precision and the reason out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from qlorad.v1 import inference_pb2
from services.common.facts import AdapterFacts, ModelFacts

_HEADROOM = 1.25
"""Room beside the weights for key-value rows, adapters and activations."""
_INT4_BYTES = 0.625
"""Of a weight: half a byte, and four bytes of scale and zero for each group of 32."""
Precision: TypeAlias = inference_pb2.Precision.ValueType


@dataclass(frozen=True, slots=True)
class Place:
    """What a device can do."""

    device: str
    free_bytes: int
    has_bf16: bool
    """Whether it computes in bfloat16 as quickly as in float32, or quicker."""

    @property
    def is_processor(self) -> bool:
        return self.device == "cpu" or self.device.startswith("cpu:")


def bytes_of(precision: Precision, model: ModelFacts) -> int:
    """Bytes of the weights when held so; of 4 and 8 bits about."""
    if precision == inference_pb2.PRECISION_NF4:
        return model.nf4_bytes
    if precision == inference_pb2.PRECISION_INT4:
        return int(model.parameters * _INT4_BYTES)
    if precision == inference_pb2.PRECISION_INT8:
        return model.parameters
    return model.parameters * (4 if precision == inference_pb2.PRECISION_FP32 else 2)


def adapter_bytes(adapter: AdapterFacts, base: Precision) -> int:
    """Bytes of an adapter beside a base held so, as far as they are known before loading."""
    return adapter.parameters * (4 if base == inference_pb2.PRECISION_FP32 else 2)


def choose(asked: Precision, model: ModelFacts, place: Place) -> tuple[Precision, str]:
    """What was asked for; else the most exact that fits with a quarter to spare, and why.

    Does not promise that the smallest fits: loading says so.
    """
    if asked != inference_pb2.PRECISION_UNSPECIFIED:
        return asked, "asked for"
    told: list[str] = []
    for precision in _order(place):
        needed = int(bytes_of(precision, model) * _HEADROOM)
        name = inference_pb2.Precision.Name(precision).removeprefix("PRECISION_").lower()
        if needed <= place.free_bytes:
            because = "the most exact that pays" if not told else f"{', '.join(told)} would not fit"
            return precision, f"{name}: {because} ({needed >> 20} MiB of {place.free_bytes >> 20} free)"
        told.append(name)
    return precision, f"{name}: the smallest there is, and it may not fit ({place.free_bytes >> 20} MiB free)"


def smaller(device: str) -> tuple[Precision, ...]:
    """What is less exact than the first choice on a device, the most exact first."""
    return _order(Place(device, 0, True))[1:]


def _order(place: Place) -> tuple[Precision, ...]:
    """What is tried, the most exact first. fp32 only where bf16 would be slower and no more exact than it."""
    first = inference_pb2.PRECISION_BF16 if place.has_bf16 else inference_pb2.PRECISION_FP32
    if place.is_processor:
        return first, inference_pb2.PRECISION_INT8, inference_pb2.PRECISION_INT4
    return first, inference_pb2.PRECISION_NF4
