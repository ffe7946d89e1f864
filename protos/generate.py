"""Makes the Python stubs from the protos.

Promises: the same protos and tool versions give the same bytes. The public
contract goes to clients/python/qlorad/v1, the daemons' own frames to
services/common/frames/v1. `--out DIR` writes the same tree elsewhere, which is
how the freshness test compares.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent
PUBLIC = "qlorad/v1"
FRAMES = "services/common/frames/v1"


def _run(arguments: list[str]) -> None:
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    common = _googleapis()
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", f"-I{common}", *arguments])
    if code != 0:
        raise SystemExit(f"protoc failed with {code}")


def _googleapis() -> pathlib.Path:
    import google.rpc

    return pathlib.Path(next(iter(google.rpc.__path__))).parent.parent


def generate(out: pathlib.Path) -> list[pathlib.Path]:
    """Writes all stubs below `out` and returns their paths."""
    made: list[pathlib.Path] = []
    for package, target, services in (
        (PUBLIC, out / "clients/python", True),
        (FRAMES, out, False),
    ):
        target.mkdir(parents=True, exist_ok=True)
        files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / package).glob("*.proto"))
        if not files:
            continue
        arguments = [f"--python_out={target}", f"--mypy_out=quiet:{target}"]
        _run([*arguments, *files])
        if services:
            served = [f for f in files if "\nservice " in (ROOT / f).read_text()]
            _run([f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}", *served])
        made += sorted(p for p in (target / package).iterdir() if "_pb2" in p.name)
        (target / package / "__init__.py").touch()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT.parent)
    out = parser.parse_args().out
    print(f"{len(generate(out))} stub files", file=sys.stderr)


if __name__ == "__main__":
    main()
