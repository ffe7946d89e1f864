"""What jobs before tell of the next one: how long it will run, and how far estimates of memory were off.

Law of this room: pure. Nothing is told that no job of this host has shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlorad.v1 import trainer_pb2

LEAST, MOST = 0.5, 2.0
"""A correction goes no farther."""
_OF_LENGTH = ("schedule", "evaluation", "checkpoints", "limits", "guards", "objective", "optimizer")
_OF_NAME = ("seed", "adapter")


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known before a job begins."""

    seconds: float | None
    correction: float
    judged_from: str


def judge(spec: trainer_pb2.TrainSpec, weights: int, tokens_at_most: int, before: Sequence[trainer_pb2.Job]) -> Judged:
    """By jobs that succeeded, newest first; `weights` of the base, `tokens_at_most` in one epoch."""
    done = [job for job in before if job.state == trainer_pb2.JOB_STATE_SUCCEEDED and job.result.steps]
    seconds, words = _time(spec, weights, tokens_at_most, done)
    correction, more = _correction(spec, done)
    return Judged(seconds, correction, "; ".join(w for w in (words, more) if w))


def _time(
    spec: trainer_pb2.TrainSpec, weights: int, tokens_at_most: int, done: Sequence[trainer_pb2.Job]
) -> tuple[float | None, str]:
    steps, epochs = spec.schedule.max_steps, spec.schedule.epochs
    same = [job for job in done if _shape(job.spec.train) == _shape(spec)]
    if same:
        rates, starts, lengths = [], [], []
        for job in same:
            whole = job.end_time.ToSeconds() - job.start_time.ToSeconds()
            work = job.result.tokens / max(job.metrics.tokens_per_second, 1e-9)
            rates.append(work / job.result.steps)
            starts.append(max(0.0, whole - work))
            lengths.append(job.result.steps / max(job.metrics.epoch, 1e-9))
        count = steps or statistics.median(lengths) * epochs
        seconds = statistics.median(starts) + count * statistics.median(rates)
        return seconds, f"time: {len(same)} jobs of the same shape here, start-up and {count:.0f} steps"
    kind = [j for j in done if _kind(j.spec.train) == _kind(spec) and j.total_steps and j.metrics.tokens_per_second]
    known = [j for j in kind if j.spec.train.model == spec.model]
    if not known or not weights:
        return None, ""
    rate = statistics.median(j.metrics.tokens_per_second for j in known)
    tokens = steps * spec.data.micro_batch_tokens * max(1, spec.data.accumulation) if steps else tokens_at_most * epochs
    effort = f"{4 * weights * rate / 1e9:.0f} GFLOP a second"
    words = f"time, at most: {len(known)} jobs with this model here, {rate:.0f} tokens a second ({effort})"
    return tokens / rate, f"{words}, {tokens:.0f} tokens"


def _correction(spec: trainer_pb2.TrainSpec, done: Sequence[trainer_pb2.Job]) -> tuple[float, str]:
    shares = [
        job.result.measured_memory_bytes / job.result.predicted_memory_bytes
        for job in done
        if job.result.predicted_memory_bytes
        and job.result.measured_memory_bytes
        and _kind(job.spec.train) == _kind(spec)
    ]
    if not shares:
        return 1.0, ""
    middle = min(MOST, max(LEAST, statistics.median(shares)))
    return middle, f"memory: {len(shares)} jobs took {middle:.2f} of what was told"


def _shape(spec: trainer_pb2.TrainSpec) -> bytes:
    """All of a spec that decides how long a step takes."""
    kept = trainer_pb2.TrainSpec()
    kept.CopyFrom(spec)
    for name in (*_OF_LENGTH, *_OF_NAME):
        kept.ClearField(name)  # type: ignore[arg-type]
    return kept.SerializeToString(deterministic=True)


def _kind(spec: trainer_pb2.TrainSpec) -> tuple[object, ...]:
    """What decides how numbers are held and computed."""
    q = spec.quantization
    return q.method, q.compute_type, spec.memory.gradient_checkpointing, spec.parallelism.ranks, spec.threads
