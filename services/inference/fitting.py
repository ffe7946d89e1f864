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
    items: Sequence[budget.Item],
    limit: int,
    setting: str,
) -> Fit:
    """The precision asked for; else bfloat16 if there is room for it, else NF4. TOO_LARGE names what is in the way."""
    bf16, nf4 = inference_pb2.PRECISION_BF16, inference_pb2.PRECISION_NF4
    need = precision.bytes_of(asked or bf16, model)
    verdict = budget.decide(items, need, limit)
    if verdict.fits:
        return Fit(asked, "", need, verdict.leave)
    if not asked:
        smaller = precision.bytes_of(nf4, model)
        verdict = budget.decide(items, smaller, limit)
        if verdict.fits:
            why = f"bfloat16 takes {need} bytes, more than {setting} leaves"
            return Fit(nf4, why, smaller, verdict.leave)
        need = smaller
    raise budget.too_large(name, need, limit, setting, verdict)
