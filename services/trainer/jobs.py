"""The life of a job: which moves are lawful, what events mean, who is next.

Law of this room: pure. A job is the fold of its events; nothing else changes
one. Time comes in with the event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qlorad.v1 import trainer_pb2
from services.common.errors import Fault, wrong_state
from services.common.frames.v1 import training_pb2
from services.trainer import plan, retention

State = trainer_pb2.JobState
_S = trainer_pb2

LAW: Final[Mapping[int, frozenset[int]]] = {
    _S.JOB_STATE_QUEUED: frozenset({_S.JOB_STATE_PREPARING, _S.JOB_STATE_PAUSED, _S.JOB_STATE_CANCELLED}),
    _S.JOB_STATE_PREPARING: frozenset(
        {_S.JOB_STATE_RUNNING, _S.JOB_STATE_PAUSING, _S.JOB_STATE_INTERRUPTED}
        | {_S.JOB_STATE_CANCELLING, _S.JOB_STATE_FAILED}
    ),
    _S.JOB_STATE_RUNNING: frozenset(
        {_S.JOB_STATE_PAUSING, _S.JOB_STATE_FINALIZING, _S.JOB_STATE_INTERRUPTED}
        | {_S.JOB_STATE_CANCELLING, _S.JOB_STATE_FAILED}
    ),
    _S.JOB_STATE_PAUSING: frozenset(
        {_S.JOB_STATE_PAUSED, _S.JOB_STATE_FINALIZING, _S.JOB_STATE_CANCELLING, _S.JOB_STATE_FAILED}
    ),
    _S.JOB_STATE_PAUSED: frozenset({_S.JOB_STATE_QUEUED, _S.JOB_STATE_CANCELLED}),
    _S.JOB_STATE_INTERRUPTED: frozenset(
        {_S.JOB_STATE_QUEUED, _S.JOB_STATE_FINALIZING, _S.JOB_STATE_CANCELLING}
        | {_S.JOB_STATE_CANCELLED, _S.JOB_STATE_FAILED}
    ),
    _S.JOB_STATE_CANCELLING: frozenset({_S.JOB_STATE_CANCELLED, _S.JOB_STATE_SUCCEEDED, _S.JOB_STATE_FAILED}),
    _S.JOB_STATE_FINALIZING: frozenset(
        {_S.JOB_STATE_SUCCEEDED, _S.JOB_STATE_CANCELLING, _S.JOB_STATE_FAILED, _S.JOB_STATE_INTERRUPTED}
    ),
    _S.JOB_STATE_SUCCEEDED: frozenset(),
    _S.JOB_STATE_FAILED: frozenset(),
    _S.JOB_STATE_CANCELLED: frozenset(),
}
TERMINAL: Final = frozenset(state for state, onward in LAW.items() if not onward)
WITH_WORKER: Final = frozenset(
    {_S.JOB_STATE_PREPARING, _S.JOB_STATE_RUNNING, _S.JOB_STATE_PAUSING, _S.JOB_STATE_CANCELLING}
    | {_S.JOB_STATE_FINALIZING}
)
STOPPING: Final = frozenset({_S.JOB_STATE_PAUSING, _S.JOB_STATE_CANCELLING})
"""Their worker is to be told to stop."""
AT_REST: Final = frozenset({_S.JOB_STATE_QUEUED, _S.JOB_STATE_PAUSED}) | TERMINAL
"""Nothing is left to be said about their last attempt."""
PAUSABLE: Final = frozenset({_S.JOB_STATE_QUEUED, _S.JOB_STATE_PREPARING, _S.JOB_STATE_RUNNING})
GOING_ON: Final = frozenset(
    {_S.JOB_STATE_QUEUED, _S.JOB_STATE_PREPARING, _S.JOB_STATE_RUNNING}
    | {_S.JOB_STATE_FINALIZING, _S.JOB_STATE_INTERRUPTED}
)
"""They need no ResumeJob."""
BACKOFF_CAP_SECONDS: Final = 60.0
DISK_FULL: Final = "DISK_FULL"
"""The one error that ends a worker and not its job: it goes on when there is space."""


class Unlawful(Exception):
    """An event that cannot follow: a fault of qlorad, never of a caller."""


def word(state: int) -> str:
    """A state as people read it."""
    return State.Name(_S.JobState.ValueType(state)).removeprefix("JOB_STATE_")


def fold(record: training_pb2.JobRecord, event: trainer_pb2.Event) -> training_pb2.JobRecord:
    """The job after one more event; Unlawful if the event cannot follow."""
    after = training_pb2.JobRecord()
    after.CopyFrom(record)
    job = after.job
    if event.sequence != job.last_sequence + 1:
        raise Unlawful(f"{job.name}: event {event.sequence} after {job.last_sequence}")
    job.last_sequence = event.sequence
    match event.WhichOneof("fact"):
        case "state_changed":
            _move(after, event)
        case "attempt_started":
            started = event.attempt_started
            job.attempt = started.attempt
            job.result.steps = started.from_step
            job.result.tokens = max((m.tokens for m in after.marks if m.step <= started.from_step), default=0)
        case "planned":
            job.total_steps = event.planned.total_steps
            after.ledger_digest = event.planned.ledger.digest
            if event.planned.HasField("chosen"):
                plan.stand(job.spec.train, event.planned.chosen)
        case "step":
            job.metrics.CopyFrom(event.step)
            _held(job.result, event.step.device_memory_bytes or event.step.host_memory_bytes)
            if not event.step.skipped:
                job.result.final_loss = event.step.loss
            job.result.steps = event.step.step
            job.result.tokens += event.step.tokens
        case "evaluated":
            after.evaluated_step = event.evaluated.step
            if event.evaluated.step == 0:
                job.result.eval_loss_before = event.evaluated.loss
            else:
                job.result.eval_loss_after = event.evaluated.loss
                _best(job.result, event.evaluated)
        case "checkpoint_sealed":
            _mark(after, event.checkpoint_sealed)
        case "adapter_sealed":
            job.result.adapter_digest = event.adapter_sealed.digest
            job.result.adapter = event.adapter_sealed.alias
        case "queue":
            job.queue.CopyFrom(event.queue)
        case "admitted":
            job.result.predicted_memory_bytes = event.admitted.predicted_bytes
            _held(job.result, event.admitted.measured_bytes)
        case "resized":
            _resize(job.spec.train, event.resized)
        case "fallback" | "log" | "trouble":
            pass
        case other:
            raise Unlawful(f"{job.name}: event {event.sequence} tells nothing that is known: {other}")
    return after


def _held(result: trainer_pb2.JobResult, memory: int) -> None:
    result.measured_memory_bytes = max(result.measured_memory_bytes, memory)


def _move(after: training_pb2.JobRecord, event: trainer_pb2.Event) -> None:
    job, change = after.job, event.state_changed
    left = job.state
    if change.to != _S.JOB_STATE_QUEUED or event.sequence != 1:
        if getattr(change, "from") != job.state or change.to not in LAW.get(job.state, frozenset()):
            raise Unlawful(f"{job.name}: {word(job.state)} cannot become {word(change.to)}")
    job.state = change.to
    job.is_terminal = change.to in TERMINAL
    if change.to != _S.JOB_STATE_QUEUED:
        job.ClearField("queue")
    if change.to == _S.JOB_STATE_PREPARING and not job.HasField("start_time"):
        job.start_time.CopyFrom(event.time)
    _rest(after, event, left)
    if change.to == _S.JOB_STATE_INTERRUPTED:
        after.lost += 1
        after.spared += change.error.reason == DISK_FULL
    if job.is_terminal:
        job.end_time.CopyFrom(event.time)
        job.end = change.end
        if change.HasField("error"):
            job.error.CopyFrom(change.error)


def _rest(after: training_pb2.JobRecord, event: trainer_pb2.Event, left: int) -> None:
    """What a pause costs neither attempts nor time for."""
    to = event.state_changed.to
    if to == _S.JOB_STATE_PAUSED:
        after.spared += left == _S.JOB_STATE_PAUSING
        if after.job.HasField("start_time") and not after.HasField("resting_since"):
            after.resting_since.CopyFrom(event.time)
    elif to == _S.JOB_STATE_PREPARING and after.HasField("resting_since"):
        rested = event.time.ToNanoseconds() - after.resting_since.ToNanoseconds()
        after.rested_seconds += max(0, rested) / 1e9
        after.ClearField("resting_since")


def _mark(after: training_pb2.JobRecord, sealed: trainer_pb2.CheckpointSealed) -> None:
    job = after.job
    marks = [m for m in after.marks if m.step < sealed.step]
    marks.append(training_pb2.Mark(step=sealed.step, digest=sealed.digest, tokens=job.result.tokens))
    if sealed.HasField("eval_loss"):
        marks[-1].eval_loss = sealed.eval_loss
    marks = retention.kept(marks, job.spec.train)
    del after.marks[:]
    after.marks.extend(marks)
    after.lost = 0
    job.result.checkpoint_digest = sealed.digest


def _best(result: trainer_pb2.JobResult, told: trainer_pb2.Evaluated) -> None:
    if not result.HasField("best_eval_loss") or told.loss < result.best_eval_loss:
        result.best_eval_loss, result.best_step = told.loss, told.step


def is_over(record: training_pb2.JobRecord, attempt: int) -> bool:
    """Whether an attempt can write nothing any more."""
    return record.job.attempt > attempt or record.job.state not in WITH_WORKER


def moved(
    record: training_pb2.JobRecord,
    to: trainer_pb2.JobState.ValueType,
    message: str = "",
    end: trainer_pb2.EndReason.ValueType = trainer_pb2.END_REASON_UNSPECIFIED,
    error: trainer_pb2.JobError | None = None,
) -> trainer_pb2.Event:
    """The event of a move from where the job is; number and time are given when it is written."""
    change = trainer_pb2.StateChanged(to=to, message=message, end=end)
    setattr(change, "from", record.job.state)
    if error is not None:
        change.error.CopyFrom(error)
    return trainer_pb2.Event(state_changed=change, attempt=record.job.attempt)


def events_of(record: training_pb2.JobRecord, fact: training_pb2.Fact) -> list[trainer_pb2.Event]:
    """What a worker's fact means for the job (a checkpoint means nothing until it is sealed)."""
    event = trainer_pb2.Event(time=fact.time, attempt=record.job.attempt)
    match fact.WhichOneof("fact"):
        case "planned":
            event.planned.CopyFrom(fact.planned)
            if record.job.state == _S.JOB_STATE_PREPARING:
                return [event, _at(fact, moved(record, _S.JOB_STATE_RUNNING))]
        case "fallback":
            event.fallback.CopyFrom(fact.fallback)
        case "step":
            event.step.CopyFrom(fact.step)
        case "evaluated":
            event.evaluated.CopyFrom(fact.evaluated)
        case "log":
            event.log.CopyFrom(fact.log)
        case "trouble":
            event.trouble.CopyFrom(fact.trouble)
        case "admitted":
            event.admitted.CopyFrom(fact.admitted)
        case "finished" if record.job.state in (_S.JOB_STATE_RUNNING, _S.JOB_STATE_PAUSING):
            return [_at(fact, moved(record, _S.JOB_STATE_FINALIZING))]
        case _:
            return []
    return [event]


def _at(fact: training_pb2.Fact, event: trainer_pb2.Event) -> trainer_pb2.Event:
    event.time.CopyFrom(fact.time)
    return event


def _resize(train: trainer_pb2.TrainSpec, told: trainer_pb2.Resized) -> None:
    train.parallelism.ranks, train.parallelism.zero_stage = told.ranks, told.zero_stage
    train.data.accumulation = told.accumulation
    if told.ranks == 1:
        train.parallelism.ClearField("offload")


def is_outcome(fact: training_pb2.Fact) -> bool:
    """Whether a fact ends its attempt."""
    return fact.WhichOneof("fact") in ("finished", "stopped", "failed")


def after_lost(record: training_pb2.JobRecord, story: str, log_tail: str) -> list[trainer_pb2.Event]:
    """What becomes of a job whose worker is gone without an outcome."""
    job = record.job
    if job.state == _S.JOB_STATE_CANCELLING:
        return [moved(record, _S.JOB_STATE_CANCELLED, "the worker was lost; the last sealed checkpoint is kept")]
    if job.state == _S.JOB_STATE_PAUSING:
        return [moved(record, _S.JOB_STATE_PAUSED, f"{story}; step {resume_from(record).step} is kept")]
    counted = job.attempt - record.spared
    first = moved(record, _S.JOB_STATE_INTERRUPTED, story)
    second = trainer_pb2.Event(attempt=job.attempt)
    setattr(second.state_changed, "from", _S.JOB_STATE_INTERRUPTED)
    if counted < job.spec.train.limits.max_attempts:
        step = resume_from(record).step
        second.state_changed.to = _S.JOB_STATE_QUEUED
        second.state_changed.message = f"goes on from step {step}" if step else "starts anew"
    else:
        second.state_changed.to = _S.JOB_STATE_FAILED
        second.state_changed.message = f"{counted} attempts were lost"
        second.state_changed.error.CopyFrom(
            trainer_pb2.JobError(
                reason="WORKER_LOST", message=f"attempt {counted} of {counted}: {story}", log_tail=log_tail
            )
        )
    return [first, second]


def after_disk_full(record: training_pb2.JobRecord, error: trainer_pb2.JobError) -> list[trainer_pb2.Event]:
    """What becomes of a job whose worker found the disk full; no attempt is used up."""
    job, step = record.job, resume_from(record).step
    kept = f"{error.message}; step {step} is kept"
    if job.state == _S.JOB_STATE_CANCELLING:
        return [moved(record, _S.JOB_STATE_CANCELLED, kept)]
    if job.state == _S.JOB_STATE_PAUSING:
        return [moved(record, _S.JOB_STATE_PAUSED, kept)]
    second = trainer_pb2.Event(attempt=job.attempt)
    setattr(second.state_changed, "from", _S.JOB_STATE_INTERRUPTED)
    second.state_changed.to = _S.JOB_STATE_QUEUED
    second.state_changed.message = f"goes on from step {step} when there is space"
    return [moved(record, _S.JOB_STATE_INTERRUPTED, error.message, error=error), second]


def after_stopped(record: training_pb2.JobRecord) -> list[trainer_pb2.Event]:
    """What becomes of a job whose worker stopped as it was asked; nothing if nobody had asked."""
    message = f"stopped as asked; step {resume_from(record).step} is kept"
    match record.job.state:
        case _S.JOB_STATE_CANCELLING:
            return [moved(record, _S.JOB_STATE_CANCELLED, message)]
        case _S.JOB_STATE_PAUSING:
            return [moved(record, _S.JOB_STATE_PAUSED, message)]
    return []


# What callers wish. Each gives the event of the wish, None where the job is there already, or WRONG_STATE.

ASKED: Final = "a caller asked for it"


def wish_to_cancel(record: training_pb2.JobRecord) -> trainer_pb2.Event | None:
    """To end it and keep its work."""
    state = record.job.state
    if state in (_S.JOB_STATE_CANCELLED, _S.JOB_STATE_CANCELLING):
        return None
    for to in (_S.JOB_STATE_CANCELLED, _S.JOB_STATE_CANCELLING):
        if to in LAW[state]:
            return moved(record, to, ASKED)
    raise _not_now(record, set(LAW) - TERMINAL)


def wish_to_pause(record: training_pb2.JobRecord) -> trainer_pb2.Event | None:
    """To hold it back and keep its work."""
    job = record.job
    if job.state in (_S.JOB_STATE_PAUSING, _S.JOB_STATE_PAUSED):
        return None
    if job.state not in PAUSABLE:
        raise _not_now(record, PAUSABLE | {_S.JOB_STATE_PAUSING, _S.JOB_STATE_PAUSED})
    if job.state == _S.JOB_STATE_QUEUED:
        return moved(record, _S.JOB_STATE_PAUSED, ASKED)
    return moved(record, _S.JOB_STATE_PAUSING, ASKED)


def wish_to_resume(record: training_pb2.JobRecord, resizes: bool = False) -> trainer_pb2.Event | None:
    """To let it go on; in another number of processes only from PAUSED."""
    if record.job.state in GOING_ON and not resizes:
        return None
    if record.job.state != _S.JOB_STATE_PAUSED:
        raise _not_now(record, {_S.JOB_STATE_PAUSED} if resizes else GOING_ON | {_S.JOB_STATE_PAUSED})
    step = resume_from(record).step
    return moved(record, _S.JOB_STATE_QUEUED, f"{ASKED}; goes on from step {step}" if step else ASKED)


def _not_now(record: training_pb2.JobRecord, states: Iterable[int]) -> Fault:
    return wrong_state(record.job.name, word(record.job.state), (word(s) for s in sorted(states)))


def seconds_at_work(record: training_pb2.JobRecord, now_seconds: float) -> float:
    """Since its first start, without what it rested by wish."""
    begun = record.job.start_time.ToNanoseconds() / 1e9
    return max(0.0, now_seconds - begun - record.rested_seconds)


def resume_from(record: training_pb2.JobRecord) -> training_pb2.Mark:
    """The newest sealed checkpoint; an empty mark if there is none."""
    return record.marks[-1] if record.marks else training_pb2.Mark()


def backoff_seconds(lost: int, first: float) -> float:
    """How long to wait after so many losses in a row."""
    return 0.0 if lost <= 0 else float(min(BACKOFF_CAP_SECONDS, first * 2 ** min(lost - 1, 30)))


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job as the queue sees it."""

    record: training_pb2.JobRecord
    not_before: float


def in_order(waiting: Iterable[Waiting]) -> list[Waiting]:
    """The queue: higher priority first, then older first."""
    return sorted(
        waiting, key=lambda w: (-w.record.job.priority, w.record.job.create_time.ToNanoseconds(), w.record.job.name)
    )


def next_to_start(queue: Sequence[Waiting], now: float) -> Waiting | None:
    """The first job that need not wait any longer."""
    return next((w for w in queue if w.not_before <= now), None)


def places(
    queue: Sequence[Waiting], now: float, hindrance: trainer_pb2.QueuePlace | None, starts: Sequence[float | None]
) -> list[trainer_pb2.QueuePlace]:
    """Why each job of the queue waits, and about how long.

    `hindrance` tells what keeps the first from starting, beside jobs that run here.
    """
    first = next_to_start(queue, now)
    found = []
    for position, (waiting, start) in enumerate(zip(queue, starts, strict=True), start=1):
        place = trainer_pb2.QueuePlace(position=position, reason=trainer_pb2.QUEUE_REASON_POSITION)
        if waiting.not_before > now:
            place.reason = trainer_pb2.QUEUE_REASON_BACKOFF
        elif waiting is first and hindrance is not None:
            place.MergeFrom(hindrance)
            start = None
        if start is not None:
            place.estimated_start.FromSeconds(round(start))
        found.append(place)
    return found
