"""The demo: it shows what it promises, and leaves nothing running whatever happens to it."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.client.cli import Cli
from tests.house import ROOT, clone_store


def demo(home: pathlib.Path) -> subprocess.Popen[str]:
    """The demo at test size, as a terminal starts it: leader of a process group."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--size", "test"],
        env={**os.environ, "QLORAD_HOME": str(home), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], word: str) -> str:
    """Reads until a line holds the word."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"{word!r} never came:\n{seen}")


@pytest.mark.parametrize("moment", ["$ qlorad model starter", pytest.param("tok/s", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_nothing_running(tmp_path: pathlib.Path, starter_home: pathlib.Path, moment: str) -> None:
    home = tmp_path / "home"
    clone_store(starter_home, home)
    process = demo(home)
    try:
        until(process, moment)
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert "the demo was interrupted" in rest and "$ qlorad down" in rest
    told = Cli(home).json("status", code=5)
    assert told["supervisor_pid"] == 0 and {d["health"] for d in told["daemons"]} == {"DOWN"}
    # That no worker is left either is what the session's last look (conftest) holds.


def test_a_home_that_is_up_is_left_alone(cli: Cli) -> None:
    process = demo(cli.home)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "is up already" in out
    assert cli.daemon("trainer")["health"] == "SERVING"


@pytest.mark.slow
def test_the_demo_at_test_size(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    home = tmp_path / "home"
    clone_store(starter_home, home)
    process = demo(home)
    out, _ = process.communicate(timeout=170)
    assert process.returncode == 0, out
    assert "leak check: 0 of " in out and "step 400/400" in out and "└──" in out
    drop = re.search(r"hold-out loss [\d.]+ before, [\d.]+ after: (\d+)% less", out)
    assert drop is not None and int(drop[1]) >= 30
    assert re.search(r"adapter sha256:[0-9a-f]{64}", out)
    assert "=== base" in out and "=== demo" in out and "nothing is left running" in out
    series = {"trainer": "qlorad", "datasets": "grpc_server", "registry": "grpc_server", "inference": "qlorad"}
    for service, word in series.items():
        assert word in (home / "metrics" / "end" / f"{service}.prom").read_text()
    assert "loss" in (home / "metrics" / "training" / "trainer.prom").read_text()
