"""What both transports decide alike: how long to wait, what of a watch is new.

Law of this room: pure; no clock, no network. Time and chance are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qlorad import errors
from qlorad.v1 import datasets_pb2, trainer_pb2

CHUNK_BYTES = 512 << 10
DEFAULT_PATIENCE_SECONDS = 300.0

Progress = Callable[[datasets_pb2.StageProgress], None]
"""Told how far work is: stage, done, total (0 = not known), and the loss while a starter is trained."""


def silent(progress: datasets_pb2.StageProgress) -> None:
    """A progress callback that says nothing."""


def stage(name: str, done: int, total: int) -> datasets_pb2.StageProgress:
    """How far work of our own is, in the daemons' words."""
    return datasets_pb2.StageProgress(stage=name, done=done, total=total)


@dataclass(slots=True)
class Patience:
    """How long to go on after a cut: waits double from 0.1 s to 3 s, until the patience is spent.

    What counts is time spent waiting since the last sign of progress. Before the
    first sign it is short: who cannot be reached at all is told so soon.
    """

    seconds: float
    first_seconds: float = 2.0
    _spent: float = 0.0
    _next: float = 0.1
    _met: bool = False

    def wait(self, error: errors.QloradError) -> float:
        """Seconds to wait before the next try; raises the error when patience is at its end."""
        known = self._met or bool(error.reason)
        limit = self.seconds if known else min(self.first_seconds, self.seconds)
        if self._spent >= limit:
            raise error
        pause = min(max(self._next, error.retry_after or 0.0), max(limit - self._spent, 0.05))
        self._spent += pause
        self._next = min(self._next * 2, 3.0)
        return pause

    def renew(self) -> None:
        """Something came: begin anew."""
        self._spent, self._next, self._met = 0.0, 0.1, True


class Gap(Exception):
    """A number was left out; attach again after the last one seen."""


@dataclass(slots=True)
class Cursor:
    """Which events of a job were seen: each is let through once, in order."""

    last: int
    ended: bool = False

    def skip_gone(self, error: errors.OutOfRange) -> int:
        """Goes on at the oldest event that the daemon keeps; returns its number. Raises the error if it tells none."""
        oldest = int(error.metadata.get("oldest_sequence", "0"))
        if oldest <= self.last + 1:
            raise error
        self.last = oldest - 1
        return oldest

    def take(self, update: trainer_pb2.WatchJobResponse) -> trainer_pb2.Event | None:
        """The event if it is the next one; None for anything to be passed over; Gap if one is missing."""
        kind = update.WhichOneof("update")
        if kind == "snapshot" and update.snapshot.is_terminal:
            self.ended = self.ended or update.snapshot.last_sequence <= self.last
        if kind != "event" or update.event.sequence <= self.last:
            return None
        if update.event.sequence != self.last + 1:
            raise Gap
        self.last = update.event.sequence
        if update.event.WhichOneof("fact") == "state_changed":
            self.ended = update.event.state_changed.to in TERMINAL
        return update.event


TERMINAL = frozenset((trainer_pb2.JOB_STATE_SUCCEEDED, trainer_pb2.JOB_STATE_FAILED, trainer_pb2.JOB_STATE_CANCELLED))


def verdict(job: trainer_pb2.Job) -> errors.JobFailed | None:
    """None for a job that ended well, else the error that says how it ended."""
    if job.state == trainer_pb2.JOB_STATE_SUCCEEDED:
        return None
    word = trainer_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
    why = f": {job.error.reason}: {job.error.message}" if job.error.reason else ""
    return errors.JobFailed(job, f"{job.name} ended {word}{why}")


def worth_repeating(error: errors.QloradError) -> bool:
    """Whether the same call may well succeed soon: the way is down, or the reader was cut off."""
    return isinstance(error, errors.Unavailable) or error.reason == "SLOW_READER"


def full_name(collection: str, name: str) -> str:
    """ "collection/x" for "x" and for "collection/x"."""
    if not name:
        raise errors.invalid(collection, name, f"a name, as in '{collection}/NAME'")
    return name if name.startswith(collection + "/") else f"{collection}/{name}"


def optional_name(collection: str, name: str) -> str:
    """As full_name, but nothing stays nothing."""
    return full_name(collection, name) if name else ""


def adapter_choice(name: str) -> str:
    """The adapter of a request: "" = the default, "base" = none, else its full name."""
    return name if name in ("", "base") else full_name("adapters", name)


def enum_value(enum: Any, prefix: str, field: str, given: str | int) -> Any:
    """A value of a proto enum from its number or its name, short ("nf4") or whole ("PRECISION_NF4")."""
    if not isinstance(given, str):
        return given
    words = {name.removeprefix(prefix).lower(): number for name, number in enum.items()}
    wanted = given.removeprefix(prefix).lower().replace("-", "_")
    if not wanted:
        return 0
    if wanted not in words or wanted == "unspecified":
        raise errors.invalid(field, given, ", ".join(w for w in words if w != "unspecified"))
    return words[wanted]


def filename_of(path: PurePath) -> str:
    """The name that an upload tells: the last part only."""
    return path.name or "upload"
