"""The seven borders hold, and each of them would notice a breach."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.contract import borders
from tests.house import ROOT


def test_no_border_is_crossed() -> None:
    assert [f"rule {b.rule}: {b.path}:{b.line}: {b.what}" for b in borders.breaches(ROOT)] == []


def test_every_file_was_walked() -> None:
    walked = {f.path for f in borders.files(ROOT)}
    listed = subprocess.run(
        ["git", "ls-files", "services/*.py", "clients/python/qlorad/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {p for p in listed if "_pb2" not in p} <= walked
    assert len(walked) >= 110
    for service in borders.SERVICES:
        assert len([p for p in walked if p.startswith(f"services/{service}/")]) >= 10
    pure = [f.path for f in borders.files(ROOT) if f.is_pure]
    assert set(borders.PURE) <= set(pure) and len(pure) >= 10


# rule, file, what is planted, whether the same line is welcome elsewhere
PLANTED = [
    (1, "services/trainer/core.py", "from services.registry import catalogue", "services/registry/x.py"),
    (1, "services/common/x.py", "import services.trainer.jobs", "services/trainer/x.py"),
    (1, "services/trainer/x.py", "import qlorad", "clients/python/qlorad/x.py"),
    (1, "services/trainer/x.py", "def f():\n    from qlorad.client import connect", "clients/python/qlorad/x.py"),
    (1, "clients/python/qlorad/x.py", "from services.common import names", "services/trainer/x.py"),
    (1, "services/trainer/x.py", "from ..registry import catalogue", "services/registry/x.py"),
    (2, "services/trainer/jobs.py", "import grpc", "services/trainer/servicer.py"),
    (2, "services/common/store.py", "from grpc_health.v1 import health_pb2", "services/common/server.py"),
    (2, "services/inference/engine.py", "from qlorad.v1 import trainer_pb2_grpc", "services/inference/app.py"),
    (2, "services/trainer/worker/servicer.py", "import grpc.aio", "services/trainer/app.py"),
    (3, "services/trainer/core.py", "import torch", "services/trainer/worker/x.py"),
    (3, "services/inference/app.py", "def f():\n    from transformers import AutoModel", "services/common/worker/x.py"),
    (3, "clients/python/qlorad/x.py", "import peft.tuners", "services/registry/worker/x.py"),
    (4, "services/trainer/jobs.py", "import time", "services/trainer/runner.py"),
    (4, "services/common/names.py", "def f(d):\n    return d.now()", "services/common/store.py"),
    (4, "services/trainer/x.py", '"""X.\n\nLaw of this room: pure."""\ndef f():\n    open("x")', ""),
    (5, "services/trainer/x.py", "cache = {}", ""),
    (5, "services/trainer/x.py", "import threading\nLOCK = threading.Lock()", ""),
    (5, "services/trainer/x.py", "def f():\n    global n\n    n = 1", ""),
    (5, "services/trainer/x.py", "print('hello')", ""),
    (5, "services/trainer/x.py", "for n in (1, 2):\n    pass", ""),
    (6, "services/trainer/jobs.py", "@dataclass\nclass X:\n    a: int", "services/trainer/runner.py"),
    (6, "services/trainer/spec.py", "@dataclass(frozen=True)\nclass X:\n    a: int", "services/trainer/runner.py"),
    (
        7,
        "services/datasets/app.py",
        "from importlib.metadata import entry_points\n\n\ndef f():\n    [e.load() for e in entry_points()]",
        "services/datasets/worker/x.py",
    ),
    (7, "services/datasets/app.py", "def f(n):\n    return __import__(n)", "services/datasets/worker/x.py"),
]


@pytest.mark.parametrize(("rule", "path", "text", "welcome"), PLANTED)
def test_a_planted_breach_is_caught(tmp_path: pathlib.Path, rule: int, path: str, text: str, welcome: str) -> None:
    for where in filter(None, (path, welcome)):
        (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / where).write_text(text + "\n")
    found = borders.breaches(tmp_path)
    assert {(b.rule, b.path) for b in found} == {(rule, path)}


def test_every_rule_has_a_planted_breach() -> None:
    assert {rule for rule, *_ in PLANTED} == set(range(1, 8)) and len(borders.RULES) == 7


def loaded(code: str) -> set[str]:
    """The modules that are there after some lines, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("stub", ["trainer", "datasets", "registry", "inference", "artifacts", "messages", "errors"])
def test_stubs_load_neither_grpc_nor_the_client(stub: str) -> None:
    there = loaded(f"import qlorad.v1.{stub}_pb2")
    assert not [m for m in there if m == "grpc" or m.startswith("grpc.")]
    ours = {m for m in there if m.startswith("qlorad") and not m.startswith("qlorad.v1")}
    assert ours == {"qlorad"}
    assert not [m for m in there if m.startswith("services")]


@pytest.mark.parametrize("service", borders.SERVICES)
def test_a_daemon_loads_no_heavy_library(service: str) -> None:
    there = loaded(f"import services.{service}.__main__, services.{service}.app, services.{service}.servicer")
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "numpy", "pandas", "pyarrow"}
    assert not heavy & there
    assert f"services.{service}.app" in there
    others = {s for s in borders.SERVICES if s != service}
    assert not [m for m in there if m.startswith("services.") and m.split(".")[1] in others]


def test_a_source_is_loaded_by_whom_it_was_asked_of() -> None:
    there = loaded("import services.datasets.worker.fetch, services.datasets.worker.ingest")
    assert "services.datasets.worker.folder" in there
    rooms = {f"services.datasets.worker.{name}" for name in ("hub", "web", "reach", "chroma")}
    assert not (rooms | {"chromadb", "huggingface_hub"}) & there


def test_the_command_line_loads_no_heavy_library() -> None:
    there = loaded("import qlorad.cli.main")
    assert not {"torch", "transformers", "numpy", "services"} & there
