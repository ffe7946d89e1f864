"""How a base fits beside those that are awake.

Law of this room: pure; sizes in, a precision and who makes room out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlorad.v1 import inference_pb2
from services.common.facts import ModelFacts
from services.inference import budget, precision


@dataclass(frozen=True, slots=True)
class Fit:
    """What is loaded, and what must leave for it."""

    precision: inference_pb2.Precision.ValueType
    """Unspecified = the engine chooses by what it finds."""
    why: str
    """Why it is held so, if that was decided here."""
    need: int
    """Bytes of the weights, as far as they are known before loading."""
    leave: tuple[str, ...]


def fit(
    name: str,
    asked: inference_pb2.Precision.ValueType,
    model: ModelFacts,
    device: str,
    items: Sequence[budget.Item],
    limit: int,
    setting: str,
) -> Fit:
    """The precision asked for; else the most exact that there is room for. TOO_LARGE names what is in the way."""
    first = precision.bytes_of(asked or inference_pb2.PRECISION_BF16, model)
    verdict = budget.decide(items, first, limit)
    if verdict.fits:
        return Fit(asked, "", first, verdict.leave)
    need = first
    for other in precision.smaller(device) if not asked else ():
        need = precision.bytes_of(other, model)
        verdict = budget.decide(items, need, limit)
        if verdict.fits:
            held = inference_pb2.Precision.Name(other).removeprefix("PRECISION_").lower()
            return Fit(other, f"{held}: bf16 takes {first} bytes, more than {setting} leaves", need, verdict.leave)
    raise budget.too_large(name, need, limit, setting, verdict)
