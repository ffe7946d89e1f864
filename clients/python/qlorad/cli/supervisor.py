"""Keeps the four daemons of a home alive: `qlorad up`.

Law of this room: signals only processes that it started. Its own life is the
lock on `state/run/up.lock`, which holds its pid; the kernel frees the lock
whoever dies. A daemon that dies is started again at the address it had, after
a wait that doubles; one that cannot be started ends the whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qlorad._connection import read_run_file
from qlorad.cli import daemons

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
STEADY_SECONDS = 60.0
GRACE_SECONDS = 20.0
CANNOT_START = 2


class CannotStart(Exception):
    """A daemon that will not start; the text is for people."""


def lock_file(home: pathlib.Path) -> pathlib.Path:
    """The lock whose holder supervises the home."""
    return home / "state" / "run" / "up.lock"


@contextlib.contextmanager
def only_one(home: pathlib.Path) -> Iterator[None]:
    """One supervisor for a home; CannotStart names the other."""
    path = lock_file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(
                f"{home} is up already (pid {holder(home) or 'unknown'}); `qlorad status` shows it, "
                "`qlorad down` ends it"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def holder(home: pathlib.Path) -> int:
    """The pid of the supervisor that lives; 0 if none does."""
    path = lock_file(home)
    if not daemons.locked(path):
        return 0
    text = path.read_text().strip()
    return int(text) if text.isdigit() else 0


def listens(first_port: int | None) -> list[list[str]]:
    """Flags for each daemon: default ports, any free ones (0), or eight in a row (gRPC, then metrics)."""
    if first_port is None:
        return [[] for _ in daemons.NAMES]
    ports = [first_port + i if first_port else 0 for i in range(8)]
    return [
        ["--listen", f"127.0.0.1:{ports[i]}", "--metrics-listen", f"127.0.0.1:{ports[4 + i]}"]
        for i in range(len(daemons.NAMES))
    ]


@dataclass(slots=True)
class Child:
    """One daemon and its ups and downs."""

    service: str
    flags: list[str]
    home: pathlib.Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    again_at: float = 0.0
    wait: float = FIRST_WAIT_SECONDS
    served: bool = False
    """Whether this process was seen SERVING."""
    ever_served: bool = False
    same_place: list[str] = field(default_factory=list)

    @property
    def log(self) -> pathlib.Path:
        return self.home / "logs" / f"{self.service}.log"

    def start(self, now: float) -> None:
        """Starts it, in a session of its own so that a terminal's Ctrl-C is not for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        flags = self.same_place or self.flags
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self.service}", "--home", str(self.home), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started, self.served = now, False

    def note_serving(self) -> None:
        """Looks whether it serves by now, and remembers where."""
        if self.process is None or self.served:
            return
        if daemons.serving(self.home, self.service, self.process.pid):
            self.served = self.ever_served = True
            told = read_run_file(self.home, self.service) or {}
            self.same_place = ["--listen", str(told["address"]), "--metrics-listen", str(told["metrics"])]

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")[-2000:].rstrip()
        return ""


class Supervisor:
    """Starts, watches, restarts, ends."""

    def __init__(self, home: pathlib.Path, first_port: int | None, tell: Callable[[str], None]) -> None:
        self._children = [
            Child(name, flags, home) for name, flags in zip(daemons.NAMES, listens(first_port), strict=True)
        ]
        self._home = home
        self._tell = tell
        self._ending = False

    def run(self, ready: Callable[[], None]) -> None:
        """Supervises until SIGTERM or SIGINT; `ready` is called once all four serve."""
        stale = [c.service for c in self._children if daemons.lives(self._home, c.service)]
        if stale:
            raise CannotStart(
                f"{', '.join(stale)} of {self._home} run already, without `qlorad up`; `qlorad down` ends them"
            )
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = {s: signal.signal(s, self._end) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        old = signal.set_wakeup_fd(writing)
        try:
            self._loop(reading, ready)
        finally:
            self._stop()
            signal.set_wakeup_fd(old)
            for number, action in before.items():
                signal.signal(number, action)
            os.close(reading)
            os.close(writing)

    def _end(self, number: int, frame: object) -> None:
        self._ending = True

    def _loop(self, reading: int, ready: Callable[[], None]) -> None:
        for child in self._children:
            child.start(time.monotonic())
        told_ready = False
        while not self._ending:
            now = time.monotonic()
            for child in self._children:
                self._tend(child, now)
            if not told_ready and all(c.served for c in self._children):
                told_ready = True
                ready()
            settled = all(c.served for c in self._children)
            if select.select([reading], [], [], 2.0 if settled else 0.05)[0]:
                os.read(reading, 512)

    def _tend(self, child: Child, now: float) -> None:
        """Sees to one daemon: restarts it when its time has come."""
        if child.process is None:
            if now >= child.again_at:
                child.start(now)
            return
        code = child.process.poll()
        if code is None:
            child.note_serving()
            return
        if now - child.started > STEADY_SECONDS:
            child.wait = FIRST_WAIT_SECONDS
        if code == CANNOT_START and not child.ever_served:
            raise CannotStart(f"qlorad-{child.service} cannot start:\n{child.tail()}")
        if code == CANNOT_START:
            child.same_place = []  # its address was taken meanwhile
        self._tell(f"qlorad-{child.service} ended ({_story(code)}); it starts again in {child.wait:g} s")
        child.process, child.again_at = None, now + child.wait
        child.wait = min(child.wait * 2, LONGEST_WAIT_SECONDS)

    def _stop(self) -> None:
        """SIGTERM to all, then SIGKILL to those that do not end."""
        living = [c for c in self._children if c.process is not None and c.process.poll() is None]
        for child in living:
            assert child.process is not None
            child.process.terminate()
        end = time.monotonic() + GRACE_SECONDS
        for child in living:
            assert child.process is not None
            try:
                child.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._tell(f"qlorad-{child.service} did not end after SIGTERM and is killed")
                child.process.kill()
                child.process.wait()


def _story(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def main(argv: Sequence[str]) -> int:
    """The detached supervisor: HOME, then the first port or "-"; its words go to logs/up.log."""
    home, port = pathlib.Path(argv[0]), argv[1]

    def tell(text: str) -> None:
        print(json.dumps({"time": time.time(), "message": text}), flush=True)

    try:
        with only_one(home):
            Supervisor(home, None if port == "-" else int(port), tell).run(lambda: tell("all four serve"))
    except CannotStart as e:
        print(e, file=sys.stderr, flush=True)
        return CANNOT_START
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
