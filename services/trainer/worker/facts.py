"""The worker's side of its attempt's folder: facts and signs of life out, the wish to stop in.

Law of this room: append only, one frame a fact, synced before the work goes on.
"""

from __future__ import annotations

import os
import pathlib
import threading
import time

from qlorad.v1 import artifacts_pb2, trainer_pb2
from services.common import artifacts, frames
from services.common.frames.v1 import training_pb2
from services.common.shelf import fsync_path
from services.trainer import launch, pulse

RESERVE_BYTES = 64 << 10


class Cancelled(Exception):
    """The daemon asked this worker to stop."""


class Heart(threading.Thread):
    """Shows that this process lives, and that its main loop comes round.

    Beats from a thread of its own, so that a long computation is no silence. Does
    not judge: that is the daemon's.
    """

    def __init__(self, sign: pathlib.Path, heartbeat_seconds: float) -> None:
        super().__init__(name="heart", daemon=True)
        self.turns = 0
        self._every = heartbeat_seconds / pulse.BEATS
        self._fd = os.open(sign, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._fd, pulse.FORMAT.pack(0, 0), 0)

    def run(self) -> None:
        beats = 0
        while True:
            beats += 1
            os.pwrite(self._fd, pulse.FORMAT.pack(beats, self.turns), 0)  # in place: a full disk does not hinder it
            time.sleep(self._every)


class Teller:
    """Appends facts; looks for the wish to stop. Rank 0 tells, the others only look."""

    def __init__(
        self, attempt: pathlib.Path, speaks: bool = True, heartbeat_seconds: float = 0.0, sign: str = pulse.SIGN
    ) -> None:
        self.attempt = attempt
        self._stop = attempt / launch.STOP
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(attempt / launch.FACTS, flags, 0o600) if speaks else -1
        self._heart = Heart(attempt / sign, heartbeat_seconds) if heartbeat_seconds > 0 else None
        if self._heart is not None:
            self._heart.start()
        if speaks:
            (attempt / launch.RESERVE).write_bytes(b"\0" * RESERVE_BYTES)

    def _turn(self) -> None:
        if self._heart is not None:
            self._heart.turns += 1

    def tell(self, fact: training_pb2.Fact) -> None:
        """Appends a fact and waits until it is on disk; on a full disk nothing of it is left."""
        self._turn()
        if self._fd < 0:
            return
        if not fact.HasField("time"):
            fact.time.FromNanoseconds(time.time_ns())
        data = memoryview(frames.pack(fact.SerializeToString()))
        whole = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, whole)
            raise

    def last_word(self, fact: training_pb2.Fact) -> None:
        """Tells how it ended, in the space that was kept back for it where the disk is full."""
        (self.attempt / launch.RESERVE).unlink(missing_ok=True)
        self.tell(fact)

    def say(self, text: str, level: str = "INFO") -> None:
        """A line for people."""
        self.tell(training_pb2.Fact(log=trainer_pb2.LogLine(level=level, text=text)))

    def asked_to_stop(self) -> bool:
        """Whether the daemon laid down the wish to stop."""
        self._turn()
        return self._stop.exists()

    def stop_if_asked(self) -> None:
        """Raises Cancelled if so."""
        if self.asked_to_stop():
            raise Cancelled

    def fresh_folder(self, name: str) -> pathlib.Path:
        """An empty folder inside the attempt's."""
        folder = self.attempt / name
        folder.mkdir(parents=True)
        return folder


def synced(folder: pathlib.Path) -> list[artifacts_pb2.FileEntry]:
    """Makes a folder durable; returns its files for the daemon to verify."""
    entries = artifacts.list_payload(folder)
    for path in [*folder.rglob("*"), folder, folder.parent]:
        fsync_path(path)
    return entries
