"""A child that obeys orders: JSON lines in, JSON lines out.

Law of this room: what the child's libraries print never mixes with its answers,
and a child that dies is told of with the end of what it said. A child waits
without computing, so two sides of a comparison can stay in memory and take turns.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from benchmarks import report


class Child:
    """A program of ours in a process of its own. Use it as a context."""

    def __init__(
        self,
        module: str,
        *words: str,
        environ: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        """`before` are words that start the program, such as `taskset -c 0`."""
        answers, told = os.pipe()
        self._answers = os.fdopen(answers)
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*before, python, "-W", "ignore", "-m", module, str(told), *words],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=[told], text=True,
            env={**os.environ, **(environ or {})}, cwd=report.ROOT,
        )  # fmt: skip
        os.close(told)

    def ask(self, do: str, **more: Any) -> Any:
        """Sends one order and waits for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer is empty then
        line = self._answers.readline()
        if not line:
            self.process.wait(10)
            self._log.seek(0)
            raise SystemExit(f"a child did not answer {do!r}: {self._log.read()[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()
        self._log.close()


def obey(orders: Mapping[str, Callable[..., Any]], told: int) -> None:
    """The child's end: answers one order after another until nobody asks any more."""
    with os.fdopen(told, "w") as answers:
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(orders[order.pop("do")](**order)), file=answers, flush=True)


def resident_bytes(pid: int) -> int:
    """What a process holds of memory; 0 if it is gone."""
    try:
        lines = (pathlib.Path("/proc") / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(next((line.split()[1] for line in lines if line.startswith("VmRSS")), "0"))
