"""What may be wrong with this machine, this installation and this home."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from dataclasses import dataclass

from qlorad.cli import daemons, supervisor
from qlorad.cli.output import size

PACKAGES = (
    "qlorad", "qlorad-services", "grpcio", "protobuf", "torch", "transformers", "peft", "bitsandbytes", "accelerate",
    "deepspeed",
)  # fmt: skip
LITTLE_MEMORY = 2 << 30
LITTLE_DISK = 2 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `mark` is ok, warn or bad."""

    mark: str
    check: str
    found: str

    def as_dict(self) -> dict[str, str]:
        """Plain data."""
        return {"mark": self.mark, "check": self.check, "found": self.found}


def examine(home: pathlib.Path) -> list[Check]:
    """All checks, in order from the machine to the daemons."""
    return [*_machine(), *_disk(home), *_devices(), *_packages(), *_home(home), *_daemons(home)]


def _machine() -> list[Check]:
    found = [Check("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.append(Check("ok" if cores > 1 else "warn", "cores", str(cores)))
    flags = _cpu_flags()
    if flags:
        fast = [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16")) if flag in flags]
        found.append(Check("ok", "bf16 in the processor", ", ".join(fast) or "no; fp32 may be faster"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.append(Check("ok" if memory >= LITTLE_MEMORY else "warn", "memory", size(memory)))
    return found


def _cpu_flags() -> set[str]:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    except OSError:
        return set()
    return set()


def _disk(home: pathlib.Path) -> list[Check]:
    there = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    return [
        Check("ok" if free >= LITTLE_DISK else "warn", "disk", f"{size(free)} free for {home}"),
        Check("ok" if writable else "bad", "home", f"{home}" + ("" if writable else " cannot be written")),
    ]


def _devices() -> list[Check]:
    if shutil.which("nvidia-smi") is None:
        return [Check("ok", "devices", "cpu (no NVIDIA driver here)")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    names = "; ".join(shown.stdout.strip().splitlines())
    return [Check("ok" if shown.returncode == 0 else "warn", "devices", names or shown.stderr.strip()[:200])]


def _packages() -> list[Check]:
    found = []
    for name in PACKAGES:
        try:
            found.append(Check("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            needed = name in ("qlorad", "grpcio", "protobuf")
            found.append(Check("bad" if needed else "warn", name, "not installed"))
    return found


def _home(home: pathlib.Path) -> list[Check]:
    """Traces of what is gone: run files whose daemon is dead, locks that nobody holds."""
    found = []
    for service in daemons.NAMES:
        told = home / "state" / "run" / f"{service}.json"
        if told.exists() and not daemons.lives(home, service):
            found.append(Check("warn", f"{service} run file", "its daemon is dead; the next start replaces it"))
    devices = home / "state" / "devices"
    for lock in sorted(devices.glob("*.lock")) if devices.is_dir() else []:
        if daemons.locked(lock):
            found.append(
                Check("ok", f"device {lock.stem}", f"in use: {lock.read_text(errors='replace').strip()[:120]}")
            )
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", "")
    stale = sorted(pathlib.Path(extensions).rglob("lock")) if extensions else []
    if stale:
        found.append(Check("warn", "build locks", f"{stale[0]}: a killed build left it; delete it if no build runs"))
    return found


def _daemons(home: pathlib.Path) -> list[Check]:
    found = []
    pid = supervisor.holder(home)
    if pid:
        found.append(Check("ok", "supervisor", f"pid {pid}"))
    for seen in daemons.look(home):
        mark = {"SERVING": "ok", "DOWN": "warn"}.get(seen.health, "bad")
        found.append(Check(mark, f"qlorad-{seen.service}", f"{seen.health} {seen.address} {seen.note}".rstrip()))
    return found
