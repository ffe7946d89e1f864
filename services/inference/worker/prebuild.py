"""Compiles the part that serves a few tokens with adapters: `python -m services.inference.worker.prebuild`.

Promises: afterwards engines on this machine use it, and a second call ends at once. Needs g++ and says so where it
is missing; engines then serve adapters without it. Takes a few seconds.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import torch

from services.inference.worker import each

_WIDE = {"AVX512": ("f", "bw", "dq", "vl"), "AVX2": ("",)}
"""By what torch says of a processor: what the compiler may use, the same that torch itself then does."""


def allowed(capability: str) -> list[str]:
    """What to tell the compiler; nothing for kinds of processors that have one form only."""
    if capability not in _WIDE:
        return []
    return [*(f"-m{capability.lower()}{part}" for part in _WIDE[capability]), "-mfma"]


def build(path: pathlib.Path, capability: str) -> None:
    """Puts the compiled part for such a processor there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    source = pathlib.Path(each.__file__).with_suffix(".cpp")
    try:
        options = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wall", "-Wno-psabi"]
        subprocess.run(["g++", *options, *allowed(capability), str(source), "-o", str(aside)], check=True)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    path = each.library()
    if path.exists():
        return
    if shutil.which("g++") is None:
        print("not built: g++ not found; adapters will cost more than they need", file=sys.stderr)
        raise SystemExit(1)
    try:
        build(path, torch.backends.cpu.get_cpu_capability())
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"not built: {e}; adapters will cost more than they need", file=sys.stderr)
        raise SystemExit(1) from e
    print(f"built: {path}")


if __name__ == "__main__":
    main()
