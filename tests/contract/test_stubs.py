"""The checked-in stubs are those of the protos."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.house import ROOT

FOLDERS = ("clients/python/qlorad/v1", "services/common/frames/v1")


def stubs(root: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in FOLDERS
        for path in (root / folder).iterdir()
        if "_pb2" in path.name
    }


def generate(out: pathlib.Path) -> dict[str, bytes]:
    subprocess.run(
        [sys.executable, str(ROOT / "protos" / "generate.py"), "--out", str(out)],
        check=True,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    return stubs(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return generate(tmp_path_factory.mktemp("stubs"))


def test_stubs_are_fresh(made: dict[str, bytes]) -> None:
    there = stubs(ROOT)
    assert sorted(there) == sorted(made)
    assert [name for name in made if made[name] != there[name]] == []
    protos = [p for f in ("qlorad/v1", "services/common/frames/v1") for p in (ROOT / "protos" / f).glob("*.proto")]
    assert len(protos) >= 10 and len(made) >= 2 * len(protos)


def test_a_stale_stub_would_be_seen(made: dict[str, bytes]) -> None:
    name = "clients/python/qlorad/v1/trainer_pb2.pyi"
    assert made[name] != made[name].replace(b"QUEUED", b"WAITING")
