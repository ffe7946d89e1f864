"""Which devices a job takes, and about when one that waits will have them.

Law of this room: pure. A slot is a device, or a share of one, that one job uses
at a time. Nobody overtakes who stands before him: a job of many devices would
never get them together.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer import jobs

RECENT: Final = 20
"""So many jobs that ended well tell how long a job takes."""
TELL_SECONDS: Final = 30.0
TELL_SHARE: Final = 0.1


def faults(devices: Sequence[str], here: Sequence[str]) -> list[str]:
    """What is wrong with a list of devices on a host that has these."""
    wrong = []
    for device in devices:
        whole, _, number = device.partition(":")
        if device not in here and not (whole == "cpu" and number.isdigit()):
            wrong.append(f"got {device!r}; accepted: {', '.join(here)}, or shares of the processor as in 'cpu:0,cpu:1'")
    if len(set(devices)) < len(devices):
        wrong.append(f"got {','.join(devices)!r}; accepted: each device once")
    if len({d.partition(":")[0] for d in devices}) > 1 or {"cpu"} < set(devices):
        wrong.append(f"got {','.join(devices)!r}; accepted: devices of one kind, the processor whole or in shares")
    return wrong


def torch_name(device: str) -> str:
    """A device as torch knows it: a share of the processor is the processor."""
    return "cpu" if device.startswith("cpu") else device


def needed(spec: trainer_pb2.TrainSpec, devices: Sequence[str]) -> int:
    """How many slots a job takes: on CUDA one for each rank."""
    return max(1, spec.parallelism.ranks) if devices[0].startswith("cuda") else 1


@dataclass(frozen=True, slots=True)
class Claim:
    """A job as the forecast sees it."""

    slots: int
    seconds: float
    """How long it will hold them; infinite where that is not known."""
    not_before: float = 0.0


def starts(total: int, running: Iterable[Claim], queue: Sequence[Claim], now: float) -> list[float | None]:
    """About when each job of the queue will start; None where that cannot be judged."""
    free = [now] * total
    for claim in running:
        for slot in sorted(range(total), key=free.__getitem__)[: claim.slots]:
            free[slot] = now + claim.seconds
    found: list[float | None] = [None] * len(queue)
    for place in sorted(range(len(queue)), key=lambda n: max(now, queue[n].not_before)):  # back-off lets others pass
        claim = queue[place]
        order = sorted(range(total), key=free.__getitem__)[: claim.slots]
        start = inf if claim.slots > total else max(free[order[-1]], claim.not_before)
        found[place] = None if start == inf else start
        for slot in order:
            free[slot] = start + claim.seconds
    return found


def usual_seconds(record: training_pb2.JobRecord, ended: Iterable[training_pb2.JobRecord]) -> float:
    """How long a job has still to run, by jobs of the same model that ended well; infinite if there is none."""
    train = record.job.spec.train
    rates, lengths = [], []
    for other in ended:
        steps = other.job.result.steps
        if other.job.spec.train.model == train.model and steps:
            rates.append(jobs.seconds_at_work(other, other.job.end_time.ToNanoseconds() / 1e9) / steps)
            lengths.append(steps)
    if not rates:
        return inf
    total = record.job.total_steps or train.schedule.max_steps or statistics.median(lengths)
    return float(max(0.0, total - jobs.resume_from(record).step) * statistics.median(rates))


def seconds_left(record: training_pb2.JobRecord, ended: Iterable[training_pb2.JobRecord]) -> float:
    """How long a job under way will hold its slots."""
    if record.job.state == trainer_pb2.JOB_STATE_PREPARING or not record.job.HasField("metrics"):
        return usual_seconds(record, ended)
    return record.job.metrics.eta_seconds


def worth_telling(before: trainer_pb2.QueuePlace, now: trainer_pb2.QueuePlace, seconds: float) -> bool:
    """Whether a place is news: a start that moved a little is none."""
    one, other = trainer_pb2.QueuePlace(), trainer_pb2.QueuePlace()
    one.CopyFrom(before)
    other.CopyFrom(now)
    one.ClearField("estimated_start")
    other.ClearField("estimated_start")
    if one != other or before.HasField("estimated_start") != now.HasField("estimated_start"):
        return True
    start = now.estimated_start.ToNanoseconds() / 1e9
    moved = abs(start - before.estimated_start.ToNanoseconds() / 1e9)
    return moved > max(TELL_SECONDS, TELL_SHARE * (start - seconds))
