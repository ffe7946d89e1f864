"""Ends what `qlorad up` began, and nothing else.

Law of this room: a process is signalled only while the lock that proves it is
one of ours is held and the pid it told is its own.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
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
        _signal(pid, lambda: supervisor.holder(home) == pid)
        _wait(lambda: supervisor.holder(home) != pid, seconds, f"the supervisor (pid {pid})")
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
        _signal(pid, partial(daemons.lives, home, service))
        _wait(partial(_gone, home, service), seconds, f"qlorad-{service} (pid {pid})")
        ended.append(service)
    return ended


def _gone(home: pathlib.Path, service: str) -> bool:
    return not daemons.lives(home, service)


def _signal(pid: int, still_ours: Callable[[], bool]) -> None:
    """SIGTERM, by a handle that cannot come to mean another process where the system has one."""
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if still_ours():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
        finally:
            os.close(handle)
    elif still_ours():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _wait(gone: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not gone():
        if time.monotonic() > end:
            raise errors.DeadlineExceeded(f"{what} has not ended within {seconds:.0f} s")
        time.sleep(0.05)


def _is(pid: int, module: str) -> bool:
    """Whether the process was started as `-m module`."""
    try:
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except FileNotFoundError:
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
        words = shown.stdout.split()
    return module in words
