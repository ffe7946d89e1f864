"""What counts as trouble in a step, what is done about it, and the loss scale of fp16.

Law of this room: pure. It decides from numbers that every rank has alike and from
what a checkpoint keeps, so all ranks, and a run that was cut, decide the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from qlorad.v1 import trainer_pb2

SMOOTH: Final = 0.9
JUDGED_FROM: Final = 10
"""Steps that must have told what is usual before a loss can be a spike."""
LEAST_DISTANCE: Final = 0.01
"""Of the smoothed loss: a loss that hardly moves is not jumped at for a hair."""
FIRST_SCALE: Final = 65536.0
GROWS_AFTER: Final = 2000
"""Steps without an overflow after which the loss scale is doubled."""

STOP, SKIP, CONTINUE = (
    trainer_pb2.TROUBLE_POLICY_STOP,
    trainer_pb2.TROUBLE_POLICY_SKIP,
    trainer_pb2.TROUBLE_POLICY_CONTINUE,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """A job's guards; jobs of before there were any have the shipped ones."""

    not_finite: trainer_pb2.TroublePolicy.ValueType = STOP
    spike: trainer_pb2.TroublePolicy.ValueType = CONTINUE
    factor: float = 8.0
    all_masked: trainer_pb2.TroublePolicy.ValueType = STOP
    max_skips: int = 10


def rules_of(spec: trainer_pb2.TrainSpec) -> Rules:
    """The guards of a resolved spec."""
    told, usual = spec.guards, Rules()
    return Rules(
        told.not_finite or usual.not_finite,
        told.spike or usual.spike,
        told.spike_factor or usual.factor,
        told.all_masked or usual.all_masked,
        told.max_skips or usual.max_skips,
    )


@dataclass(frozen=True, slots=True)
class Usual:
    """What losses have been, each average still with start bias."""

    average: float = 0.0
    distance: float = 0.0
    """How far a step's loss was from the smoothed one before it."""
    steps: int = 0
    """Steps that were counted; skipped ones are not."""

    @property
    def smoothed(self) -> float:
        """The smoothed loss; 0 before the first step."""
        return self.average / (1 - SMOOTH**self.steps) if self.steps else 0.0

    @property
    def usual_distance(self) -> float:
        """The distance that is usual, never nothing."""
        told = self.distance / (1 - SMOOTH ** (self.steps - 1)) if self.steps > 1 else 0.0
        return max(told, LEAST_DISTANCE * abs(self.smoothed))

    def after(self, loss: float) -> Usual:
        """With one more step's loss."""
        away = abs(loss - self.smoothed) if self.steps else 0.0
        return Usual(
            SMOOTH * self.average + (1 - SMOOTH) * loss,
            SMOOTH * self.distance + (1 - SMOOTH) * away,
            self.steps + 1,
        )


def of_mask(step: int, rows: list[int], rules: Rules) -> trainer_pb2.Trouble:
    """The trouble of a step none of whose tokens carries loss."""
    message = f"no token of step {step} carries loss (rows {rows[:8]})"
    return trainer_pb2.Trouble(step=step, kind="ALL_MASKED", done=rules.all_masked, message=message)


def of_loss(step: int, loss: float, usual: Usual, rules: Rules) -> trainer_pb2.Trouble | None:
    """What is wrong with a step's loss, if anything."""
    if not math.isfinite(loss):
        message = f"the loss of step {step} is {loss}"
        return trainer_pb2.Trouble(step=step, kind="NOT_FINITE", value=loss, done=rules.not_finite, message=message)
    border = usual.smoothed + rules.factor * usual.usual_distance
    if usual.steps < JUDGED_FROM or loss <= border:
        return None
    message = (
        f"the loss of step {step} is {loss:.6g}, the smoothed loss {usual.smoothed:.6g} and its usual distance "
        f"{usual.usual_distance:.3g}: above {border:.6g} is a spike (guards.spike_factor {rules.factor:g})"
    )
    return trainer_pb2.Trouble(step=step, kind="SPIKE", value=loss, done=rules.spike, message=message)


def of_gradient(step: int, norm: float, rules: Rules) -> trainer_pb2.Trouble | None:
    """What is wrong with a step's gradient, if anything."""
    if math.isfinite(norm):
        return None
    message = f"the gradient's norm of step {step} is {norm}"
    return trainer_pb2.Trouble(step=step, kind="NOT_FINITE", value=norm, done=rules.not_finite, message=message)


@dataclass(frozen=True, slots=True)
class Scale:
    """What a loss is multiplied by before the backward pass, so that fp16 can hold its gradient."""

    value: float = 1.0
    steps: int = 0
    """Steps since it last changed."""

    def after(self, overflowed: bool) -> Scale:
        """Halved where the gradient ran over, doubled after a long while."""
        if overflowed:
            return Scale(max(1.0, self.value / 2))
        if self.steps + 1 == GROWS_AFTER:
            return Scale(self.value * 2)
        return Scale(self.value, self.steps + 1)


def scale_of(spec: trainer_pb2.TrainSpec, value: float, steps: int) -> Scale:
    """The scale of a run that has come so far; 0 = it has not begun. Only fp16 needs one."""
    if spec.quantization.compute_type != trainer_pb2.COMPUTE_TYPE_FP16:
        return Scale()
    return Scale(value or FIRST_SCALE, steps)
