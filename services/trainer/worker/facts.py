"""The worker's side of its attempt's folder: facts out, the wish to stop in.

Law of this room: append only, one frame a fact, synced before the work goes on.
"""

from __future__ import annotations

import os
import pathlib
import time

from qlorad.v1 import artifacts_pb2, trainer_pb2
from services.common import artifacts, frames
from services.common.frames.v1 import training_pb2
from services.common.shelf import fsync_path
from services.trainer import launch


class Cancelled(Exception):
    """The daemon asked this worker to stop."""


class Teller:
    """Appends facts; looks for the wish to stop. Rank 0 tells, the others only look."""

    def __init__(self, attempt: pathlib.Path, speaks: bool = True) -> None:
        self.attempt = attempt
        self._stop = attempt / launch.STOP
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(attempt / launch.FACTS, flags, 0o600) if speaks else -1

    def tell(self, fact: training_pb2.Fact) -> None:
        """Appends a fact and waits until it is on disk."""
        if self._fd < 0:
            return
        if not fact.HasField("time"):
            fact.time.FromNanoseconds(time.time_ns())
        data = memoryview(frames.pack(fact.SerializeToString()))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    def say(self, text: str, level: str = "INFO") -> None:
        """A line for people."""
        self.tell(training_pb2.Fact(log=trainer_pb2.LogLine(level=level, text=text)))

    def asked_to_stop(self) -> bool:
        """Whether the daemon laid down the wish to stop."""
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
