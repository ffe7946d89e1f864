"""Compiles the part that serves a few tokens with adapters: `python -m services.inference.worker.prebuild`.

Promises: afterwards engines on this machine use it, and a second call ends at once. Needs g++ and says so where it
is missing; engines then serve adapters without it. Takes about ten seconds the first time.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

from services.inference.worker import each


def build(path: pathlib.Path) -> None:
    """Puts the compiled part there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    source = pathlib.Path(each.__file__).with_suffix(".cpp")
    try:
        # No -march of this machine: the source names the processors it has a form for.
        options = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wall", "-Wno-psabi"]
        subprocess.run(["g++", *options, str(source), "-o", str(aside)], check=True)
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
        build(path)
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"not built: {e}; adapters will cost more than they need", file=sys.stderr)
        raise SystemExit(1) from e
    print(f"built: {path}")


if __name__ == "__main__":
    main()
