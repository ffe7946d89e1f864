"""A paused job that is to go on in another number of processes.

Law of this room: pure. A step keeps its micro-batches, so the rows of every step
stay what they are; a checkpoint does not depend on who wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlorad.v1 import trainer_pb2
from services.common.errors import Violation, invalid, show
from services.trainer import slots, spec


def resized(
    train: trainer_pb2.TrainSpec, ranks: int, host: spec.Host, devices: Sequence[str]
) -> trainer_pb2.Resized | None:
    """What changes; None where nothing does; INVALID_ARGUMENT with ALL that is wrong."""
    before = max(1, train.parallelism.ranks)
    if ranks == before:
        return None
    if train.data.accumulation:
        _divides(train.data.accumulation * before, ranks)
    elif not 1 <= ranks <= spec.MAX_RANKS:
        raise invalid([Violation("ranks", show(ranks), f"1 to {spec.MAX_RANKS}")])
    wanted = trainer_pb2.TrainSpec()
    wanted.CopyFrom(train)
    wanted.parallelism.ranks = ranks
    wanted.parallelism.zero_stage = 0 if ranks == 1 else train.parallelism.zero_stage or 2
    if ranks == 1:
        wanted.parallelism.ClearField("offload")
    wrong = [Violation("ranks", show(ranks), f"{v.accepted} ({v.field})") for v in spec.of_ranks(wanted, host)]
    if slots.needed(wanted, devices) > len(devices):
        wrong.append(Violation("ranks", show(ranks), f"1 to {len(devices)} here: a rank takes a device"))
    if wrong:
        raise invalid(wrong)
    return trainer_pb2.Resized(
        ranks=ranks, accumulation=train.data.accumulation * before // ranks, zero_stage=wanted.parallelism.zero_stage
    )


def _divides(batches: int, ranks: int) -> None:
    could = [n for n in range(1, min(spec.MAX_RANKS, batches) + 1) if batches % n == 0]
    if ranks not in could:
        accepted = f"{', '.join(map(str, could))}: each rank takes as many of the {batches} micro-batches of a step"
        raise invalid([Violation("ranks", show(ranks), accepted)])
