"""Values of a spec that must fit one another, whatever the model, the dataset and the host.

Law of this room: pure. Says what is wrong and the nearest that would do; bends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from qlorad.v1 import trainer_pb2
from services.common.errors import Violation, show


def violations(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    """All of them."""
    yield from _steps(train)
    yield from _schedule(train)
    yield from _judged(train)
    yield from _alone(train)
    yield from _measured(train)


def _measured(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    """A micro-batch that is to be found by measuring needs a budget, and one process."""
    if train.data.micro_batch_tokens:
        return
    if not train.memory.budget_bytes:
        accepted = "above 0 where data.micro_batch_tokens is 0"
        yield Violation("spec.train.memory.budget_bytes", show(train.memory.budget_bytes), accepted)
    if train.parallelism.ranks > 1:
        accepted = f"{train.data.max_length_tokens} (max_length_tokens) or more where there are several ranks"
        yield Violation("spec.train.data.micro_batch_tokens", "0", accepted)


def within(low: float, high: float, above: bool = False, below: bool = False) -> Callable[[Any], bool]:
    """Whether a number is finite and lies there."""

    def good(value: Any) -> bool:
        if not math.isfinite(value):
            return False
        return bool((low < value if above else low <= value) and (value < high if below else value <= high))

    return good


def _schedule(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    schedule = train.schedule
    if not schedule.max_steps and not within(0, 10_000, above=True)(schedule.epochs):
        yield Violation("spec.train.schedule.epochs", show(schedule.epochs), "above 0, at most 10000; or max_steps")
    if schedule.max_steps and schedule.warmup_steps >= schedule.max_steps:
        accepted = f"0 to {schedule.max_steps - 1} (below max_steps)"
        yield Violation("spec.train.schedule.warmup_steps", show(schedule.warmup_steps), accepted)

    if schedule.kind == trainer_pb2.SCHEDULE_KIND_CONSTANT and schedule.floor_share:
        accepted = "0 where kind is SCHEDULE_KIND_CONSTANT"
        yield Violation("spec.train.schedule.floor_share", show(schedule.floor_share), accepted)
    if schedule.kind == trainer_pb2.SCHEDULE_KIND_STABLE_DECAY and not within(0, 1, above=True)(schedule.decay_share):
        yield Violation("spec.train.schedule.decay_share", show(schedule.decay_share), "above 0, at most 1")


def _steps(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    """What a step consists of."""
    data = train.data
    field = "spec.train.data.accumulation"
    if data.step_tokens and data.accumulation:
        yield Violation(field, show(data.accumulation), "0 where data.step_tokens decides; or step_tokens 0")
    if not data.step_tokens and not 1 <= data.accumulation <= 65536:
        yield Violation(field, show(data.accumulation), "1 to 65536; or 0 with data.step_tokens")
    if data.length_grouping and data.packing:
        accepted = "False where data.packing is True (packed rows are not filled up); or packing False"
        yield Violation("spec.train.data.length_grouping", "True", accepted)


def _judged(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    """What needs evaluations while the job trains."""
    if train.evaluation.every_steps:
        return
    for path, value, off in (
        ("evaluation.patience", train.evaluation.patience, "0"),
        ("evaluation.keep_best_adapter", train.evaluation.keep_best_adapter, "False"),
        ("checkpoints.keep_best", train.checkpoints.keep_best, "0"),
    ):
        if value:
            accepted = f"{off} where evaluation.every_steps is 0; or every_steps above 0"
            yield Violation(f"spec.train.{path}", show(value), accepted)


def _alone(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    """What one process can do and several cannot; of their optimiser see spec.py."""
    if train.parallelism.ranks <= 1:
        return
    if train.lora.dora and train.parallelism.zero_stage == 3:
        accepted = (
            "False where parallelism.zero_stage is 3 (no rank holds the weights that are measured); or zero_stage 2"
        )
        yield Violation("spec.train.lora.dora", "True", accepted)
    if train.quantization.method == trainer_pb2.QUANTIZATION_METHOD_INT8:
        accepted = "QUANTIZATION_METHOD_NF4 or QUANTIZATION_METHOD_NONE where ranks > 1"
        yield Violation("spec.train.quantization.method", "QUANTIZATION_METHOD_INT8", accepted)
    if train.quantization.compute_type == trainer_pb2.COMPUTE_TYPE_FP16:
        accepted = "COMPUTE_TYPE_BF16 or COMPUTE_TYPE_FP32 where ranks > 1"
        yield Violation("spec.train.quantization.compute_type", "COMPUTE_TYPE_FP16", accepted)
