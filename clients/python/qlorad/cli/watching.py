"""A job as one looks on: a live line on a terminal, plain lines elsewhere, a picture at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qlorad import errors
from qlorad.cli import output as out
from qlorad.cli import picture
from qlorad.cli.output import Format
from qlorad.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from qlorad.client import Client

LINES_IN_ALL = 20
"""How many step lines a whole job gives where there is no terminal."""


class View(Protocol):
    """Where a job's news goes."""

    def step(self, step: pb.StepMetrics) -> None: ...
    def line(self, text: str) -> None: ...


@dataclass(slots=True)
class Curve:
    """What the picture at the end is made of."""

    points: list[picture.Point] = field(default_factory=list)
    evaluations: list[picture.Point] = field(default_factory=list)

    def take(self, event: pb.Event) -> None:
        """Keeps a step's or an evaluation's loss; a step done again after a resume replaces its first doing."""
        kind = event.WhichOneof("fact")
        if kind == "step":
            while self.points and self.points[-1][0] >= event.step.step:
                self.points.pop()
            self.points.append((float(event.step.step), event.step.loss))
        elif kind == "evaluated":
            while self.evaluations and self.evaluations[-1][0] >= event.evaluated.step:
                self.evaluations.pop()
            self.evaluations.append((float(event.evaluated.step), event.evaluated.loss))


def follow(client: Client, name: str, output: Format, after: int) -> pb.Job:
    """Shows a job until it has ended, whatever dies in between, and returns it."""
    curve = Curve()
    with _view(output) as view:

        def cut(error: errors.QloradError, seconds: float) -> None:
            view.line(f"the watch was cut ({_brief(error)}); attaching again in {seconds:.1f} s")

        def gone(after: int, oldest: int) -> None:
            view.line(f"events {after + 1} to {oldest - 1} are not kept any more")

        for event in client.jobs.watch(name, after_sequence=after, on_reattach=cut, on_gone=gone):
            curve.take(event)
            if output is Format.jsonl:
                out.emit_json(out.as_dict(event))
            if event.WhichOneof("fact") == "step":
                view.step(event.step)
            else:
                view.line(line(event))
    if output is Format.table:
        for row in drawn(curve):
            print(row)
    return client.jobs.get(name)


def drawn(curve: Curve) -> list[str]:
    """The loss picture: the steps as a line, hold-out losses as "o"."""
    if len(curve.points) < 2:
        return []
    return picture.draw(curve.points, fancy=out.unicode_ok(sys.stdout), marks=curve.evaluations)


def line(event: pb.Event) -> str:
    """An event in one line."""
    kind = event.WhichOneof("fact")
    if kind == "state_changed":
        changed = event.state_changed
        before, after = _state(getattr(changed, "from")), _state(changed.to)
        text = after if before in (after, "UNSPECIFIED") else f"{before} -> {after}"
        why = [changed.message, f"{changed.error.reason}: {changed.error.message}" if changed.error.reason else ""]
        return ": ".join(w for w in (text, *why) if w)
    if kind == "attempt_started":
        begun = event.attempt_started
        return f"attempt {begun.attempt} on {begun.device}, from step {begun.from_step}"
    if kind == "planned":
        plan = event.planned
        rows = ", ".join(f"{s.rows} {s.split}" for s in plan.ledger.splits)
        return (
            f"planned {plan.total_steps} steps over {rows} rows; {out.count(plan.trainable_parameters)} of "
            f"{out.count(plan.base_parameters)} weights train; {plan.threads} threads on {plan.device}; "
            f"packing {plan.packing_efficiency:.0%}"
        )
    if kind == "fallback":
        return f"fall-back: {event.fallback.used} instead of {event.fallback.asked}: {event.fallback.why}"
    if kind == "step":
        return step_line(event.step)
    if kind == "evaluated":
        told = event.evaluated
        return f"hold-out loss {told.loss:.4f} at step {told.step} ({told.rows} rows)"
    if kind == "checkpoint_sealed":
        sealed = event.checkpoint_sealed
        return f"checkpoint at step {sealed.step}: {out.short(sealed.digest)} ({out.size(sealed.size_bytes)})"
    if kind == "adapter_sealed":
        made = event.adapter_sealed
        return f"adapter {made.digest}" + (f" is {made.alias}" if made.alias else "")
    if kind == "log":
        return f"{event.log.level} {event.log.text}"
    if kind == "queue":
        return f"queue: {queue(event.queue)}"
    return f"event {event.sequence}"


def step_line(step: pb.StepMetrics) -> str:
    """A step in one line."""
    total = f"/{step.total_steps}" if step.total_steps else ""
    return (
        f"step {step.step}{total}  loss {step.loss:.4f} ({step.loss_smoothed:.4f})  lr {step.learning_rate:.2e}  "
        f"{step.tokens_per_second:.0f} tok/s  eta {_clock(step.eta_seconds)}"
    )


def queue(place: pb.QueuePlace) -> str:
    """A place in the queue in words."""
    reason = out.word(pb.QueueReason, "QUEUE_REASON_", place.reason)
    held = f" by {place.owner} ({out.size(place.owner_bytes)})" if place.owner else ""
    hint = "; `qlorad model unload` frees what serving holds" if place.reason == pb.QUEUE_REASON_DEVICE_BUSY else ""
    start = f", starts about {out.when(place.estimated_start)}" if place.HasField("estimated_start") else ""
    return f"position {place.position}, {reason}{held}{start}{hint}"


@contextlib.contextmanager
def _view(output: Format) -> Iterator[View]:
    if output is not Format.table:
        yield _Nothing()
    elif not out.terminal(sys.stdout):
        yield _Lines()
    else:
        from qlorad.cli import live

        with live.job_line() as view:
            yield view


class _Nothing:
    """No view: the stream itself is the answer."""

    def step(self, step: pb.StepMetrics) -> None:
        """Says nothing."""

    def line(self, text: str) -> None:
        """Says nothing."""


class _Lines:
    """Plain lines; of the steps only so many that a log stays readable."""

    def step(self, step: pb.StepMetrics) -> None:
        """Prints the first, the last, and about twenty between."""
        every = max(1, step.total_steps // LINES_IN_ALL)
        if step.step in (1, step.total_steps) or step.step % every == 0:
            print(step_line(step), flush=True)

    def line(self, text: str) -> None:
        """Prints it."""
        print(text, flush=True)


def _brief(error: errors.QloradError) -> str:
    return (error.reason or error.code).lower().replace("_", " ")


def _state(value: int) -> str:
    return out.word(pb.JobState, "JOB_STATE_", value)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
