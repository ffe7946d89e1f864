"""What Prometheus itself says of a scrape."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def check(text: str) -> None:
    """Fails with promtool's words unless it takes the text; skips where there is no promtool."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian package prometheus) is not here")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
