"""The plain client is made from the asyncio one, and is fresh."""

from __future__ import annotations

import inspect
import subprocess
import sys

import qlorad.aio.client
import qlorad.client
from tests.house import ROOT


def test_the_plain_modules_are_what_they_would_be_made_into() -> None:
    script = ROOT / "clients" / "python" / "unasync.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_clients_offer_the_same_and_only_one_is_asynchronous() -> None:
    with qlorad.client.connect(home="/nowhere") as plain:
        other = qlorad.aio.client.connect(home="/nowhere")
        methods = 0
        for room in ("datasets", "models", "adapters", "jobs", "inference"):
            for name, method in inspect.getmembers(getattr(plain, room), inspect.ismethod):
                if name.startswith("_"):
                    continue
                twin = getattr(getattr(other, room), name)
                assert list(inspect.signature(method).parameters) == list(inspect.signature(twin).parameters)
                assert not inspect.iscoroutinefunction(method) and not inspect.isasyncgenfunction(method)
                assert inspect.iscoroutinefunction(twin) or inspect.isasyncgenfunction(twin)
                methods += 1
        assert methods >= 36
