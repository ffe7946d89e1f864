"""Which checkpoints a job keeps.

Law of this room: pure. The newest one, from which the job would go on, is kept
whatever the rules say, and so is the one whose adapter the job would end with.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2


def best(marks: Sequence[training_pb2.Mark]) -> training_pb2.Mark | None:
    """The one of the lowest hold-out loss, of equals the first; None where none was evaluated."""
    return _by_loss(marks)[0] if _by_loss(marks) else None


def reasons(
    marks: Sequence[training_pb2.Mark], spec: trainer_pb2.TrainSpec
) -> dict[int, list[trainer_pb2.KeptAs.ValueType]]:
    """Why each stays, by step; those that do not stay have no reason.

    Fields that a spec of before does not have keep nothing of their own.
    """
    rules, found = spec.checkpoints, {m.step: list[trainer_pb2.KeptAs.ValueType]() for m in marks}
    ranked, in_order = _by_loss(marks), sorted(found)
    for step in in_order[-max(1, rules.keep_last) :]:
        found[step].append(trainer_pb2.KEPT_AS_LAST)
    for mark in ranked[: max(rules.keep_best, 1 if spec.evaluation.keep_best_adapter else 0)]:
        found[mark.step].append(trainer_pb2.KEPT_AS_BEST)
    for step in in_order:
        if rules.keep_every_steps and step % rules.keep_every_steps == 0:
            found[step].append(trainer_pb2.KEPT_AS_EVERY)
    return found


def kept(marks: Sequence[training_pb2.Mark], spec: trainer_pb2.TrainSpec) -> list[training_pb2.Mark]:
    """Those that stay, oldest first."""
    why = reasons(marks, spec)
    return [m for m in sorted(marks, key=lambda m: m.step) if why[m.step]]


def _by_loss(marks: Sequence[training_pb2.Mark]) -> list[training_pb2.Mark]:
    """Those that were evaluated, the lowest loss first; a loss that is no number is none."""
    told = [m for m in marks if m.HasField("eval_loss") and m.eval_loss == m.eval_loss]
    return sorted(told, key=lambda m: (m.eval_loss, m.step))
