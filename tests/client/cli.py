"""The command line as a process, in a home of its own."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pathlib
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from qlorad.cli import daemons, main
from tests.house import ROOT


@dataclass
class Cli:
    """Runs `qlorad` for a home."""

    home: pathlib.Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a command sees."""
        return {**os.environ, "QLORAD_HOME": str(self.home), "PYTHONIOENCODING": "utf-8", **self.environ}

    def command(self, *words: str) -> list[str]:
        """The words of the process."""
        return [sys.executable, "-m", "qlorad.cli.main", *words]

    def run(self, *words: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, which must be this exit code."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=170,
        )
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def inside(self, *words: str, code: int = 0) -> str:
        """What a command prints, run in this very process: a third of a second less each time."""
        told, said = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ, self.environment, clear=True):
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
                ended = main.run(list(words))
        assert ended == code, f"{words} ended with {ended}\n{told.getvalue()}\n{said.getvalue()}"
        return told.getvalue()

    def both(self, *words: str, code: int, folder: pathlib.Path) -> tuple[str, str]:
        """What a command prints and says, run in this very process and in a folder, as for a terminal with UTF-8."""
        told, said = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with mock.patch.dict(os.environ, self.environment, clear=True), contextlib.chdir(folder):
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
                ended = main.run(list(words))
        shown = [stream.buffer.getvalue().decode() for stream in (told, said)]  # type: ignore[attr-defined]
        assert ended == code, f"{words} ended with {ended}\n{shown}"
        return shown[0], shown[1]

    def json(self, *words: str, code: int = 0) -> Any:
        """The one JSON document that a command prints."""
        told = self.inside(*words, "-o", "json", code=code)
        assert len(told.splitlines()) == 1, told
        return json.loads(told)

    def lines(self, *words: str, code: int = 0) -> list[Any]:
        """The JSON lines that a command prints."""
        return [json.loads(line) for line in self.inside(*words, "-o", "jsonl", code=code).splitlines()]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command that goes on; end it yourself."""
        return subprocess.Popen(
            self.command(*words),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def on_terminal(self, *words: str) -> str:
        """What a person at a terminal of 100 columns sees of a command that ends well."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environ = {**self.environment, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):  # a runner of tests may have set them; the terminal tells its own
            environ.pop(name, None)
        process = subprocess.Popen(
            self.command(*words), env=environ, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT
        )
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal ends
            while piece := os.read(ours, 65536):
                seen += piece
        os.close(ours)
        assert process.wait(60) == 0, seen.decode()
        return seen.decode()

    def daemon(self, service: str) -> dict[str, Any]:
        """What `status` says of a daemon."""
        with mock.patch.dict(os.environ, self.environment, clear=True):
            seen = daemons.look(self.home)
        told: dict[str, Any] = next(one.as_dict() for one in seen if one.service == service)
        return told


@contextlib.contextmanager
def up(home: pathlib.Path, **environ: str) -> Iterator[Cli]:
    """A home whose four daemons are up, by `qlorad up --detach`, and down afterwards."""
    cli = Cli(home, environ)
    try:
        cli.run("up", "--detach", "--ports", "0")
        yield cli
    finally:
        cli.run("down")
