"""`make bench`: what it costs to have a daemon. Each alone: exec to SERVING and memory at rest; the start of `qlorad`.

Writes benchmarks/results/control.json and a line in benchmarks/HISTORY.md.
Ends with 1 if a bar is not met. Not for speed of work: that is measured as
ratios against peers, elsewhere.
"""

from __future__ import annotations

import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import report

SERVICES = ("datasets", "registry", "trainer", "inference")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "numpy")
ROUNDS = 7
BARS = {"control.start_ms": (1000.0, False), "control.rss_mb": (100.0, False)}
GOALS = {"control.start_ms": 300.0, "control.rss_mb": 60.0}


def _serving(port: int, until: float) -> None:
    """Waits for the port, then for health; a channel that meets a closed port would wait a second by itself."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if time.monotonic() > until:
            raise SystemExit("the daemon does not listen")
        time.sleep(0.002)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=until - time.monotonic())
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


def start(service: str, home: pathlib.Path) -> tuple[float, float, list[str]]:
    """Milliseconds from exec to SERVING as a client sees it, RSS in MB a second later, heavy modules mapped."""
    port = _free_port()
    command = [sys.executable, "-m", f"services.{service}", "--home", str(home), "--listen", f"127.0.0.1:{port}"]
    begun = time.monotonic()
    with (home / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--metrics-listen", "127.0.0.1:0"], stdout=log, stderr=log, cwd=report.ROOT
        )
    try:
        _serving(port, begun + 60)
        milliseconds = (time.monotonic() - begun) * 1000
        time.sleep(1.0)
        seen = psutil.Process(process.pid)
        mapped = {pathlib.Path(m.path).name for m in seen.memory_maps()}
        heavy = [h for h in HEAVY if any(h in name for name in mapped)]
        return milliseconds, seen.memory_info().rss / 1e6, heavy
    finally:
        process.terminate()
        if process.wait(30) != 0:
            raise SystemExit(f"qlorad-{service} ended with {process.returncode}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def modules(service: str) -> list[str]:
    """Heavy modules that a daemon has loaded once everything of it is imported."""
    code = f"import services.{service}.__main__, services.{service}.app, sys; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=report.ROOT
    ).stdout
    return [h for h in HEAVY if h in told.split()]


def help_ms() -> float:
    """`qlorad --help`, as a person waits for it."""
    begun = time.monotonic()
    program = pathlib.Path(sys.executable).parent / "qlorad"
    subprocess.run([str(program), "--help"], capture_output=True, check=True, cwd=report.ROOT)
    return (time.monotonic() - begun) * 1000


def main() -> None:
    starts: dict[str, list[float]] = {s: [] for s in SERVICES}
    sizes: dict[str, list[float]] = {s: [] for s in SERVICES}
    helps: list[float] = []
    heavy: dict[str, list[str]] = {s: modules(s) for s in SERVICES}
    for number in range(ROUNDS + 1):  # the first round warms the disk cache and does not count
        for service in SERVICES:
            with tempfile.TemporaryDirectory() as home:
                ms, mb, mapped = start(service, pathlib.Path(home))
            heavy[service] += mapped
            if number:
                starts[service].append(ms)
                sizes[service].append(mb)
        waited = help_ms()
        if number:
            helps.append(waited)
    middle = {s: {"start_ms": statistics.median(starts[s]), "rss_mb": statistics.median(sizes[s])} for s in SERVICES}
    results: dict[str, Any] = {
        "control.start_ms": round(max(m["start_ms"] for m in middle.values()), 1),
        "control.rss_mb": round(max(m["rss_mb"] for m in middle.values()), 1),
        "control.help_ms": round(statistics.median(helps), 1),
        "daemons": {s: {k: round(v, 1) for k, v in m.items()} for s, m in middle.items()},
        "heavy_modules": {s: sorted(set(h)) for s, h in heavy.items()},
        "bars": {k: {"bar": bar, "goal": GOALS[k]} for k, (bar, _) in BARS.items()},
        "conditions": report.conditions(("grpcio", "protobuf", "prometheus-client", "typer"), rounds=ROUNDS, seeds=[]),
    }
    for service, m in results["daemons"].items():
        print(f"{service:10} exec to SERVING {m['start_ms']:7.1f} ms   at rest {m['rss_mb']:5.1f} MB")
    figures = (
        f"start {results['control.start_ms']} ms, rss {results['control.rss_mb']} MB, "
        f"help {results['control.help_ms']} ms"
    )
    report.write("control", results, figures)
    report.judge(results, BARS)
    failed = [f"{s} loads {', '.join(h)}" for s, h in results["heavy_modules"].items() if h]
    if failed:
        raise SystemExit("not met: " + "; ".join(failed))


if __name__ == "__main__":
    main()
