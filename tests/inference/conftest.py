"""Homes with adapters, sound and unsound; one daemon that many tests share."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import made_once
from tests.house import ROOT, Daemon, clone_store, house
from tests.inference import kit


@dataclass
class Served:
    """A running daemon with the starter in fp32 and the sound adapters."""

    daemon: Daemon
    stub: kit.Stub
    oracle: dict[str, list[dict[str, Any]]]
    home: pathlib.Path


@pytest.fixture(scope="session")
def adapters_home(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> pathlib.Path:
    """A home with models/starter-test and the adapters of make_adapters. Not to be written to."""

    def make(home: pathlib.Path) -> None:
        clone_store(starter_home, home)
        made = subprocess.run(
            [sys.executable, "-m", "tests.inference.make_adapters", str(home)],
            cwd=ROOT, capture_output=True, text=True, timeout=170, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[-3000:]

    return made_once(tmp_path_factory, "adapters", make)


@pytest.fixture(scope="session")
def oracle(adapters_home: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """What plain transformers and peft say: adapter -> answers with prompt, ids, margins."""
    told: dict[str, list[dict[str, Any]]] = json.loads((adapters_home / "oracle.json").read_text())
    return told


@pytest.fixture
def serving_home(tmp_path: pathlib.Path, adapters_home: pathlib.Path) -> pathlib.Path:
    """A fresh home with the starter and the adapters."""
    clone_store(adapters_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, adapters_home: pathlib.Path, oracle: dict[str, list[dict[str, Any]]]
) -> Iterator[Served]:
    """One daemon for a module; tests leave ada, bob, cy, dee loaded and the base as the default."""
    home = tmp_path_factory.mktemp("served") / "home"
    clone_store(adapters_home, home)
    with house(home) as h:
        daemon, stub = kit.start(h)
        kit.load(stub, "ada", "bob", "cy", "dee")
        yield Served(daemon, stub, oracle, home)
