"""Real daemons for tests: started as processes, on free ports, in a home of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

ROOT = pathlib.Path(__file__).resolve().parent.parent
T = TypeVar("T")


def eventually(look: Callable[[], T | None], seconds: float = 60.0, what: str = "it") -> T:
    """Asks again and again until the answer is truthy; fails with `what` when time is up."""
    end = time.monotonic() + seconds
    pause = 0.01
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come to be within {seconds:.0f} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


@dataclass
class Daemon:
    """One daemon process."""

    service: str
    home: pathlib.Path
    flags: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    """What is run, where it is not `services.SERVICE`."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        """Starts it and waits until it tells its address."""
        self.run_file.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        told = ["--home", str(self.home), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module or f"services.{self.service}", *told, *self.flags],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env={**os.environ, **self.environ},
            )
        eventually(self._up, what=f"qlorad-{self.service}")
        return self

    def _up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"qlorad-{self.service} ended with {self.process.returncode}:\n{self.tail()}")
        return self.run_file.exists()

    @property
    def run_file(self) -> pathlib.Path:
        return self.home / "state" / "run" / f"{self.service}.json"

    @property
    def log(self) -> pathlib.Path:
        return self.home / "logs" / f"{self.service}.log"

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    @property
    def told(self) -> dict[str, Any]:
        """What it says of itself: address, metrics, pid."""
        told: dict[str, Any] = json.loads(self.run_file.read_text())
        return told

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and waits for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"qlorad-{self.service} did not end after SIGTERM:\n{self.tail()}") from None

    def channel(self) -> grpc.Channel:
        """A plain channel to it; close it when done."""
        return grpc.insecure_channel(self.told["address"])


class House:
    """Daemons that share one home."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home = home
        self.daemons: dict[str, Daemon] = {}
        self._channels: list[grpc.Channel] = []

    def start(self, service: str, *flags: str, environ: Mapping[str, str] | None = None) -> Daemon:
        """Starts a daemon (again)."""
        daemon = Daemon(service, self.home, flags, environ or {})
        self.daemons[service] = daemon
        return daemon.start()

    def channel(self, service: str) -> grpc.Channel:
        """A channel to a running daemon; closed with the house."""
        channel = self.daemons[service].channel()
        self._channels.append(channel)
        return channel

    def close(self) -> None:
        """Ends every daemon."""
        for channel in self._channels:
            channel.close()
        for daemon in self.daemons.values():
            if daemon.process is not None and daemon.process.poll() is None:
                with contextlib.suppress(AssertionError):
                    daemon.stop()


@contextlib.contextmanager
def house(home: pathlib.Path) -> Iterator[House]:
    """A house that is closed whatever happens."""
    h = House(home)
    try:
        yield h
    finally:
        h.close()


def clone_store(source: pathlib.Path, home: pathlib.Path) -> None:
    """Gives a home the artifacts of another by hard links."""
    (home / "store").parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-al", str(source / "store"), str(home / "store")], check=True)
