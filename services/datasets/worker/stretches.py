"""A large JSONL file in stretches of whole lines, parsed by this process and a mate.

Law of this room: what comes out is the same, byte for byte, as if one process
had read the file from its beginning to its end; only the order of work differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.common import frames
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker.bound import Refused
from services.datasets.worker.findings import Tally

LARGE_BYTES = 32 << 20
STRETCH_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some whole lines of a file."""

    begin: int
    end: int
    lines_before: int


def worth_it(container: str, size: int) -> bool:
    """Whether a file is read by two processes."""
    return container == "jsonl" and size >= LARGE_BYTES and (os.cpu_count() or 1) > 1


def cut(path: pathlib.Path, begin: int, stretch_bytes: int = STRETCH_BYTES) -> Iterator[Stretch]:
    """The stretches of a file from a byte on; reads it once, holds one block."""
    with path.open("rb") as f:
        f.seek(begin)
        at, start, lines, lines_before = begin, begin, 0, 0
        while block := f.read(min(_BLOCK_BYTES, stretch_bytes)):
            if at + len(block) - start >= stretch_bytes and (newline := block.find(b"\n")) >= 0:
                lines += 1
                yield Stretch(start, at + newline + 1, lines_before)
                start, lines_before = at + newline + 1, lines_before + lines
                lines = block.count(b"\n", newline + 1)
            else:
                lines += block.count(b"\n")
            at += len(block)
        if start < at:
            yield Stretch(start, at, lines_before)


class Opened:
    """A stretch as a file of its own, of which no more is held than was asked for."""

    def __init__(self, path: pathlib.Path, begin: int, end: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(begin)
        self._left = end - begin

    def read1(self, size: int, /) -> bytes:
        """The next bytes; none behind the last."""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Mate:
    """Another process that parses stretches. Ends when this one does."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "services.datasets.worker.mate", "--fd", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        finally:
            theirs.close()
        self._line = frames.Line(ours.detach())

    def parse(self, order: ingest_pb2.StretchOrder) -> ingest_pb2.StretchReport:
        """What became of a stretch; Refused as the mate refused."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._line.send(order.SerializeToString())
        body = self._line.receive()
        if body is None:
            # It went the way this process would have gone: of a signal, or with a story in the log.
            code = self._process.wait()
            os.kill(os.getpid(), -code if code < 0 else signal.SIGABRT)
            raise SystemExit(f"the mate ended with {code}")
        report = ingest_pb2.StretchReport.FromString(body)
        if report.HasField("refusal"):
            raise Refused(report.refusal)
        return report

    def close(self) -> None:
        """Ends the mate and waits for it."""
        self._line.close()
        self._process.wait()


Work = Callable[[ingest_pb2.StretchOrder], ingest_pb2.StretchReport]


def parse_all(
    orders: Iterator[ingest_pb2.StretchOrder],
    parse: Work,
    told: Callable[[ingest_pb2.StretchOrder, ingest_pb2.StretchReport], bool],
) -> list[ingest_pb2.StretchReport]:
    """Has every order done, here and by a mate; reports in order. `told` hears each and may stop the rest."""
    reports: dict[int, ingest_pb2.StretchReport] = {}
    failed: list[BaseException] = []
    turn = threading.Lock()
    is_over = False

    def take() -> ingest_pb2.StretchOrder | None:
        with turn:
            return None if is_over or failed else next(orders, None)

    def work(do: Work) -> None:
        nonlocal is_over
        while (order := take()) is not None:
            report = do(order)
            with turn:
                reports[order.segment] = report
                is_over = told(order, report) or is_over

    def beside() -> None:
        mate = Mate()
        try:
            work(mate.parse)
        except BaseException as e:
            failed.append(e)
        finally:
            mate.close()

    thread = threading.Thread(target=beside, name="mate")
    thread.start()
    try:
        work(parse)
    except BaseException as e:
        failed.append(e)
    thread.join()
    if failed:
        raise failed[0]
    return [reports[number] for number in sorted(reports)]


def tally_of(report: ingest_pb2.StretchReport) -> Tally:
    """What a stretch's notes counted."""
    tally = Tally([tuple(n) for n in json.loads(report.first_errors_json)])
    for counted in report.finding_counts:
        tally.counts[counted.rule, counted.severity] = counted.count
    return tally
