"""Ends what `qlorad up` began, and nothing else.

Law of this room: a process is signalled only while the lock that proves it is
one of ours is held and the pid it told is its own.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial

from qlorad import errors
from qlorad._connection import read_run_file
from qlorad.cli import daemons, supervisor


def end(home: pathlib.Path, seconds: float) -> list[str]:
    """Ends the supervisor, then daemons that run without one; returns what was ended."""
    ended = []
    pid = supervisor.holder(home)
    if pid:
        _end(pid, lambda: supervisor.holder(home) == pid, seconds, f"the supervisor (pid {pid})")
        ended.append("supervisor")
    for service in daemons.NAMES:
        if not daemons.lives(home, service):
            continue
        told = read_run_file(home, service) or {}
        pid = int(str(told.get("pid", 0)))
        if pid <= 1 or not _is(pid, f"services.{service}"):
            raise errors.FailedPrecondition(
                f"qlorad-{service} of {home} runs, but which process it is cannot be told; wait until it serves, "
                "or end it by hand",
                reason="WRONG_STATE",
            )
        _end(pid, partial(daemons.lives, home, service), seconds, f"qlorad-{service} (pid {pid})")
        ended.append(service)
    return ended


def _end(pid: int, still_ours: Callable[[], bool], seconds: float, what: str) -> None:
    """SIGTERM, then waits until the process is gone.

    By a handle that cannot come to mean another process, where the system has one;
    elsewhere a process counts as gone when its lock is free.
    """
    until = time.monotonic() + seconds
    handle = _handle(pid)
    try:
        if still_ours():
            with contextlib.suppress(ProcessLookupError):
                if handle is None:
                    os.kill(pid, signal.SIGTERM)
                else:
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
        while still_ours() or (handle is not None and not select.select([handle], [], [], 0)[0]):
            if time.monotonic() > until:
                raise errors.DeadlineExceeded(f"{what} has not ended within {seconds:.0f} s")
            time.sleep(0.05)
    finally:
        if handle is not None:
            os.close(handle)


def _handle(pid: int) -> int | None:
    """A pidfd; None where there are none, or the process is gone."""
    if not hasattr(os, "pidfd_open"):
        return None
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None


def _is(pid: int, module: str) -> bool:
    """Whether the process was started as `-m module`."""
    try:
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except FileNotFoundError:
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
        words = shown.stdout.split()
    return module in words
