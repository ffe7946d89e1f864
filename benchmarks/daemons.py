"""Daemons that a benchmark talks to: real ones, in a home of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import report


@contextlib.contextmanager
def running(
    service: str, home: pathlib.Path, more: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that serves, with flags and environment beyond the usual; its address stands in its run file."""
    told = _run_file(service, home)
    told.unlink(missing_ok=True)
    flags = ["--home", str(home), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *more]
    with (home / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{service}", *flags], stdout=log, stderr=log, cwd=report.ROOT,
            env={**os.environ, **(environ or {})},
        )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not told.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"qlorad-{service} did not start: {(home / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def address(service: str, home: pathlib.Path) -> str:
    """Where it serves."""
    return str(json.loads(_run_file(service, home).read_text())["address"])


def _run_file(service: str, home: pathlib.Path) -> pathlib.Path:
    return home / "state" / "run" / f"{service}.json"
