"""The learning rate of each step.

Law of this room: a function of the step's number, the steps in all and the spec.
Warm-up goes straight up; then the course goes down to its floor, which is
reached after the last step, so that the last step learns too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlorad.v1 import trainer_pb2

DECAY_SHARE = 0.1
"""Of STABLE_DECAY where a spec of before says nothing."""


@dataclass(frozen=True, slots=True)
class Course:
    """Which way a rate goes."""

    kind: str
    """Name of the enum value, without its prefix."""
    full: float
    warmup_steps: int = 0
    warmup_share: float = 0.0
    floor_share: float = 0.0
    decay_share: float = DECAY_SHARE

    def warmup(self, total: int) -> int:
        """Steps that warm up."""
        return self.warmup_steps or int(self.warmup_share * total)

    def rate(self, step: int, total: int) -> float:
        """The rate of a step, from 1; above `total` it is where it ends."""
        warmup = self.warmup(total)
        if step <= warmup:
            return self.full * step / (warmup + 1)
        if self.kind == "INVERSE_SQRT":
            return self.full * max(self.floor_share, math.sqrt((warmup + 1) / step))
        if self.kind == "STABLE_DECAY":
            warmup = max(warmup, total - max(1, round((self.decay_share or DECAY_SHARE) * total)))
            if step <= warmup:
                return self.full
        done = min(1.0, (step - warmup - 1) / max(1, total - warmup))
        if self.kind in ("LINEAR", "STABLE_DECAY"):
            return self.full * self._above_floor(1.0 - done)
        if self.kind == "COSINE":
            return self.full * self._above_floor(0.5 * (1.0 + math.cos(math.pi * done)))
        return self.full

    def _above_floor(self, share: float) -> float:
        return self.floor_share + (1.0 - self.floor_share) * share


def course_of(spec: trainer_pb2.TrainSpec) -> Course:
    """The course of a resolved spec."""
    s = spec.schedule
    return Course(
        trainer_pb2.ScheduleKind.Name(s.kind).removeprefix("SCHEDULE_KIND_"),
        spec.optimizer.learning_rate,
        s.warmup_steps,
        s.warmup_share,
        s.floor_share,
        s.decay_share,
    )
