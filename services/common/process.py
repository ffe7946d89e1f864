"""Workers: child processes that own torch, or that parse what strangers sent.

Law of this room: exec'ed, never forked-and-run; own process group; only the
named file descriptors are inherited; stdout and stderr go to a log file. A
worker on a socket must exit when the socket closes (the daemon died).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message

from services.common import frames


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a worker; 0 = none."""

    memory_bytes: int = 0
    cpu_seconds: int = 0


_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_KEY")
_LIMITS = "QLORAD_WORKER_LIMITS"


def apply_limits() -> None:
    """The first line of every worker's main: bounds this process as the daemon asked.

    Done by the child itself, since code between fork and exec can hang a threaded parent.
    """
    memory, cpu = (int(n) for n in os.environ.get(_LIMITS, "0,0").split(","))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if cpu:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a worker inherits: the daemon's environment without its secrets.

    Threads that wait for one another sleep: spinning ones, the default, stand in
    each other's way as soon as another process computes (17 times slower on two cores).
    """
    keep = {k: v for k, v in os.environ.items() if not any(word in k.upper() for word in _SECRET_WORDS)}
    keep.update({"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
    keep.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep.update({"TOKENIZERS_PARALLELISM": "false", **(extra or {})})
    return keep


async def start(
    module: str,
    arguments: Sequence[str],
    log: pathlib.Path,
    pass_fds: Sequence[int] = (),
    environ: Mapping[str, str] | None = None,
    limits: Limits = Limits(),
) -> asyncio.subprocess.Process:
    """Executes `python -m module arguments…` in a process group of its own.

    Outlives the daemon unless it watches a socket of it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            env=environment({**(environ or {}), _LIMITS: f"{limits.memory_bytes},{limits.cpu_seconds}"}),
        )


def start_detached(
    module: str,
    arguments: Sequence[str],
    log: pathlib.Path,
    pass_fds: Sequence[int] = (),
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """As `start`, for a worker that outlives the daemon (asyncio kills its children when its loop ends). Blocking."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            env=environment(environ),
        )


def kill(pid: int, sig: int = signal.SIGKILL) -> None:
    """Signals a worker's whole process group; silent if it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, sig)


def tail(log: pathlib.Path, limit: int = 4000) -> str:
    """The end of a worker's log."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - limit))
            return f.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def exit_story(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None:
        return "still runs"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


@dataclass(slots=True)
class Talk:
    """A worker at the other end of a socket."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    log: pathlib.Path
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, message: Message) -> None:
        """Sends one frame; ConnectionError if the worker is gone."""
        async with self._sending:
            self.writer.write(frames.pack(message.SerializeToString()))
            await self.writer.drain()

    async def receive(self) -> bytes | None:
        """The next body; None when the worker is gone. BadFrame counts as gone."""
        try:
            return await frames.read(self.reader)
        except (ConnectionError, frames.BadFrame):
            return None

    async def close(self, grace_seconds: float = 5.0) -> int:
        """Closes the socket, waits, kills if need be, and returns the exit code."""
        self.writer.close()
        try:
            return await asyncio.wait_for(self.process.wait(), grace_seconds)
        except TimeoutError:
            kill(self.process.pid)
            return await self.process.wait()


async def start_talk(
    module: str,
    log: pathlib.Path,
    arguments: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    environ: Mapping[str, str] | None = None,
    limits: Limits = Limits(),
) -> Talk:
    """Starts a worker that talks frames on the fd named by `--fd`."""
    ours, theirs = socket.socketpair()
    try:
        process = await start(
            module,
            ["--fd", str(theirs.fileno()), *arguments],
            log,
            [theirs.fileno(), *pass_fds],
            environ,
            limits,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_unix_connection(sock=ours, limit=frames.MAX_FRAME)
    return Talk(process, reader, writer, log)
