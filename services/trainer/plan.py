"""What a device can do of what was asked: facts in, a plan and its fall-backs out.

Law of this room: pure. Decided once, on the first attempt; what was chosen then
stands in the job's spec, so that every later attempt does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from qlorad.v1 import trainer_pb2

Method: TypeAlias = trainer_pb2.QuantizationMethod.ValueType
Compute: TypeAlias = trainer_pb2.ComputeType.ValueType
Kind: TypeAlias = trainer_pb2.OptimizerKind.ValueType

NF4, INT8, NONE = (
    trainer_pb2.QUANTIZATION_METHOD_NF4,
    trainer_pb2.QUANTIZATION_METHOD_INT8,
    trainer_pb2.QUANTIZATION_METHOD_NONE,
)
BF16, FP16, FP32 = trainer_pb2.COMPUTE_TYPE_BF16, trainer_pb2.COMPUTE_TYPE_FP16, trainer_pb2.COMPUTE_TYPE_FP32
ADAMW, ADAMW_8BIT = trainer_pb2.OPTIMIZER_KIND_ADAMW, trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT
PAGED = {trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW: ADAMW, trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW_8BIT: ADAMW_8BIT}
"""Paged optimisers and what they are without pages."""
ROOM: Final = 0.8
"""Of a device's memory: the base's weights may take so much of it."""
_SMALLER: Final = {NONE: (INT8, NF4), INT8: (NF4,), NF4: ()}


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What was found out about a device."""

    kind: str
    """"cuda", "mps" or "cpu"."""
    memory_bytes: int
    """In all; 0 = not known."""
    bf16: bool
    """Whether its hardware computes in bf16 (on x86: AVX512-BF16 or AMX; on CUDA: 8.0 and up)."""
    quantizes: bool
    """Whether bitsandbytes works there."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a run is held and computed."""

    method: Method
    compute: Compute
    optimizer: Kind


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done, and where that is not what was asked."""

    used: Form
    fallbacks: tuple[trainer_pb2.Fallback, ...]


def form_of(spec: trainer_pb2.TrainSpec) -> Form:
    """What a spec asks for."""
    return Form(spec.quantization.method, spec.quantization.compute_type, spec.optimizer.kind)


def decide(asked: Form, facts: DeviceFacts, weights: Callable[[Form], int]) -> Plan:
    """What the device can do of it; `weights` tells about what the base takes in a form."""
    used, told = asked, list[trainer_pb2.Fallback]()
    for step in (_compute, _method, _smaller, _optimizer):
        after, why = step(used, facts, weights)
        if why:
            told.append(trainer_pb2.Fallback(asked=_words(used, after), used=_words(after, used), why=why))
        used = after
    return Plan(used, tuple(told))


def _compute(form: Form, facts: DeviceFacts, _: Callable[[Form], int]) -> tuple[Form, str]:
    if form.compute == FP16 and facts.kind != "cuda":
        return replace(form, compute=BF16 if facts.bf16 else FP32), f"fp16 is for CUDA, the device is {facts.kind}"
    if form.compute == BF16 and not facts.bf16:
        other = FP16 if facts.kind == "cuda" else FP32
        return replace(form, compute=other), f"the {facts.kind} device has no bf16 in its hardware"
    return form, ""


def _method(form: Form, facts: DeviceFacts, _: Callable[[Form], int]) -> tuple[Form, str]:
    if form.method != NONE and not facts.quantizes:
        return replace(form, method=NONE), f"bitsandbytes does not work on {facts.kind} here"
    return form, ""


def _smaller(form: Form, facts: DeviceFacts, weights: Callable[[Form], int]) -> tuple[Form, str]:
    room = int(ROOM * facts.memory_bytes)
    if not room or not facts.quantizes or weights(form) <= room:
        return form, ""
    why = f"the base would take {weights(form) / 1e9:.1f} of the device's {facts.memory_bytes / 1e9:.1f} GB"
    for method in _SMALLER.get(form.method, ()):
        other = replace(form, method=method)
        if weights(other) <= room:
            return other, why
    return form, ""  # nothing is small enough: whoever admits the job says so


def _optimizer(form: Form, facts: DeviceFacts, _: Callable[[Form], int]) -> tuple[Form, str]:
    if form.optimizer in PAGED and facts.kind != "cuda":
        other = PAGED[form.optimizer]
        if other == ADAMW_8BIT and not facts.quantizes:
            return replace(form, optimizer=ADAMW), f"bitsandbytes does not work on {facts.kind} here"
        return replace(form, optimizer=other), f"on {facts.kind} there is no other memory to move state to"
    if form.optimizer in (*PAGED, ADAMW_8BIT) and not facts.quantizes:
        return replace(form, optimizer=ADAMW), f"bitsandbytes does not work on {facts.kind} here"
    return form, ""


def _words(form: Form, other: Form) -> str:
    """What of a form differs from another, as people read it."""
    told = []
    if form.method != other.method:
        told.append(f"quantization {_name(trainer_pb2.QuantizationMethod.Name(form.method))}")
    if form.compute != other.compute:
        told.append(f"compute in {_name(trainer_pb2.ComputeType.Name(form.compute))}")
    if form.optimizer != other.optimizer:
        told.append(f"optimizer {_name(trainer_pb2.OptimizerKind.Name(form.optimizer))}")
    return ", ".join(told)


def _name(whole: str) -> str:
    for prefix in ("QUANTIZATION_METHOD_", "COMPUTE_TYPE_", "OPTIMIZER_KIND_"):
        whole = whole.removeprefix(prefix)
    return whole


# What was chosen, as it travels and as it stands.


def use(spec: trainer_pb2.TrainSpec, form: Form) -> None:
    """Writes a form into a spec."""
    spec.quantization.method, spec.quantization.compute_type = form.method, form.compute
    if form.method != NF4:
        spec.quantization.double_quantization = False
    spec.optimizer.kind = form.optimizer


def chosen_of(spec: trainer_pb2.TrainSpec) -> trainer_pb2.Chosen:
    """What device and memory decide, as it stands in a spec whose every choice is made."""
    return trainer_pb2.Chosen(
        quantization=spec.quantization.method,
        compute_type=spec.quantization.compute_type,
        optimizer=spec.optimizer.kind,
        micro_batch_tokens=spec.data.micro_batch_tokens,
        accumulation=spec.data.accumulation,
        gradient_checkpointing=spec.memory.gradient_checkpointing,
    )


def stand(spec: trainer_pb2.TrainSpec, chosen: trainer_pb2.Chosen) -> None:
    """Writes what was chosen into a spec; `chosen_of` would give it again."""
    use(spec, Form(chosen.quantization, chosen.compute_type, chosen.optimizer))
    spec.data.micro_batch_tokens, spec.data.accumulation = chosen.micro_batch_tokens, chosen.accumulation
    spec.memory.gradient_checkpointing = chosen.gradient_checkpointing
