"""How a base is held when the caller leaves it to the daemon.

Law of this room: pure; sizes in, a precision out.
"""

from __future__ import annotations

from qlorad.v1 import inference_pb2
from services.common.facts import AdapterFacts, ModelFacts

# Room beside the weights for key-value rows, adapters and activations.
_HEADROOM = 1.25


def bytes_of(precision: inference_pb2.Precision.ValueType, model: ModelFacts) -> int:
    """Bytes of the weights when held so."""
    if precision == inference_pb2.PRECISION_NF4:
        return model.nf4_bytes
    return model.parameters * (4 if precision == inference_pb2.PRECISION_FP32 else 2)


def adapter_bytes(adapter: AdapterFacts, base: inference_pb2.Precision.ValueType) -> int:
    """Bytes of an adapter beside a base held so, as far as they are known before loading."""
    return adapter.parameters * (4 if base == inference_pb2.PRECISION_FP32 else 2)


def choose(
    asked: inference_pb2.Precision.ValueType, model: ModelFacts, free_bytes: int
) -> inference_pb2.Precision.ValueType:
    """What was asked for; else bfloat16 where it fits with a quarter to spare, else NF4.

    Does not promise that NF4 fits: loading says so.
    """
    if asked != inference_pb2.PRECISION_UNSPECIFIED:
        return asked
    fits = bytes_of(inference_pb2.PRECISION_BF16, model) * _HEADROOM <= free_bytes
    return inference_pb2.PRECISION_BF16 if fits else inference_pb2.PRECISION_NF4
