"""How a benchmark tells what it found: a results file, a line of history, bars met or not.

Law of this room: every figure comes with what a reader needs to repeat it.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
_HISTORY = """# What was measured

Absolute times hold only on their machine; see benchmarks/README.md.

| when | commit | what | figures | where |
|---|---|---|---|---|
"""


def conditions(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 2),
        "versions": {p: metadata.version(p) for p in packages},
        **more,
    }


def write(name: str, results: Mapping[str, Any], figures: str) -> None:
    """Writes results/NAME.json and a line of HISTORY.md, and says the figures. `results` holds its conditions."""
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    told = results["conditions"]
    where = f"{told['machine']}, load {told['load']}, Python {told['python']}"
    history = ROOT / "benchmarks" / "HISTORY.md"
    if not history.exists():
        history.write_text(_HISTORY)
    with history.open("a") as f:
        f.write(f"| {told['time']} | {told['commit']} | {name} | {figures} | {where} |\n")
    print(figures)


def judge(results: Mapping[str, Any], bars: Mapping[str, tuple[float, bool]]) -> None:
    """Ends with 1 where a bar is not met; a bar is a number, and whether it is a floor."""
    missed = [
        f"{key} is {results[key]}, the bar is {bar}"
        for key, (bar, is_floor) in bars.items()
        if (results[key] < bar if is_floor else results[key] > bar)
    ]
    if missed:
        raise SystemExit("not met: " + "; ".join(missed))
