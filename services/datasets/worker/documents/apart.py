"""Documents read by a process of their own, as the ingest worker sees it.

Law of this room: whatever a document does to its reader, what comes of it is a
finding about that document; the next one has a new reader.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from qlorad.v1 import datasets_pb2
from services.common import frames
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker.documents import bounds
from services.datasets.worker.found import Problem, Record, Unreadable

_NEAR_BOUND = 0.4
"""Of the memory that a document may take. One that fails asks for much at once, so what it had is less."""


@dataclass(eq=False)
class UnreadableDocument(Unreadable):
    """A document that cannot be read; others are not touched by it."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a document holds."""

    kind: str
    records: list[Record]
    findings: list[tuple[int, Problem]]
    items: dict[str, int]
    """By rule."""
    left: dict[str, int]
    """Blocks, by the rule that left them out."""


class Reader:
    """Another process, which reads documents. Ends when this one does."""

    def __init__(self, memory_bytes: int = bounds.MEMORY_BYTES, cpu_seconds: int = bounds.CPU_SECONDS) -> None:
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._line: frames.Line | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, path: pathlib.Path, filename: str, as_texts: bool) -> Read:
        """A document; UnreadableDocument, by name, if it cannot be read within the bounds."""
        order = ingest_pb2.DocumentOrder(
            path=str(path),
            filename=filename,
            as_texts=as_texts,
            memory_bytes=self._memory_bytes,
            cpu_seconds=self._cpu_seconds,
        )
        line = self._line or self._start()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.send(order.SerializeToString())
        body = line.receive()
        if body is None:
            raise UnreadableDocument(self._story())
        report = ingest_pb2.DocumentReport.FromString(body)
        if report.rule:
            raise UnreadableDocument(Problem(report.rule, report.message, report.hint), report.line)
        found = orjson.loads(report.found_json)
        records = [Record(at, row, spans=tuple(spans)) for at, row, spans in found["rows"]]
        return Read(report.kind, records, list(_problems(found["findings"])), found["items"], found["left"])

    def close(self) -> None:
        """Ends the reader and waits for it."""
        if self._line is not None and self._process is not None:
            self._line.close()
            self._process.wait()
            self._line = self._process = None

    def _start(self) -> frames.Line:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "services.datasets.worker.documents.read", "--fd", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        finally:
            theirs.close()
        self._line = frames.Line(ours.detach())
        return self._line

    def _story(self) -> Problem:
        """Why the reader is no more."""
        assert self._process is not None
        _, status, used = os.wait4(self._process.pid, 0)
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        self.close()
        if code == -signal.SIGKILL:  # nobody in here did that: it goes for the worker as a whole
            os.kill(os.getpid(), signal.SIGKILL)
        if code == -signal.SIGXCPU:
            told = f"reading it takes more than the {self._cpu_seconds} CPU seconds that a document may take"
            return Problem("document_too_large", told, "cut it in parts")
        if code < 0 and used.ru_maxrss * 1024 > _NEAR_BOUND * self._memory_bytes:  # C++ ends so where Python raises
            return bounds.out_of_memory(self._memory_bytes)
        if code < 0:
            told = f"its reader ended with {signal.Signals(-code).name}"
            return bounds.broken(
                f"{told}, as on damage, or where it needs more than {self._memory_bytes} bytes of memory"
            )
        return bounds.broken(f"its reader ended with {code}")


def _problems(found: list[list[object]]) -> Iterator[tuple[int, Problem]]:
    for at, rule, message, hint, field, severity in found:
        known = datasets_pb2.Severity.ValueType(severity)  # type: ignore[arg-type]
        yield int(at), Problem(str(rule), str(message), str(hint), str(field), known)  # type: ignore[call-overload]
