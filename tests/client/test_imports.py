"""What an import costs: stubs alone, the bare package, the command line's help."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.house import ROOT


def modules_after(code: str) -> set[str]:
    """Names of all modules loaded after some lines in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stderr.split())


@pytest.mark.parametrize("stub", ["artifacts", "datasets", "errors", "inference", "messages", "registry", "trainer"])
def test_a_stub_loads_neither_grpc_nor_a_client_module(stub: str) -> None:
    loaded = modules_after(f"import qlorad.v1.{stub}_pb2")
    assert f"qlorad.v1.{stub}_pb2" in loaded
    assert not {m for m in loaded if m.split(".")[0] == "grpc"}
    assert {m for m in loaded if m.startswith("qlorad.") and not m.startswith("qlorad.v1")} == set()


def test_the_bare_package_loads_nothing_and_its_names_load_what_they_need() -> None:
    assert not {m for m in modules_after("import qlorad; dir(qlorad)") if m.split(".")[0] in ("grpc", "google")}
    assert "grpc" not in modules_after("import qlorad; qlorad.errors.NotFound; qlorad.QloradError")
    loaded = modules_after("import qlorad; qlorad.connect")
    assert "qlorad.client" in loaded and "qlorad.aio" not in loaded
    assert "qlorad.aio.client" in modules_after("import qlorad; qlorad.aio.connect")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import qlorad

    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = qlorad.conect  # type: ignore[attr-defined]


def test_the_client_needs_only_its_own_packages() -> None:
    loaded = modules_after("import qlorad; qlorad.connect; qlorad.aio.connect")
    assert not {m for m in loaded if m.split(".")[0] in ("services", "typer", "rich", "yaml", "torch")}


def test_help_is_quick_because_it_loads_little() -> None:
    loaded = modules_after(
        "from qlorad.cli.main import app\n"
        "try: app(['--help'], prog_name='qlorad', standalone_mode=False)\n"
        "except SystemExit: pass"
    )
    assert "typer" in loaded
    assert not {m for m in loaded if m.split(".")[0] in ("grpc", "rich", "yaml", "torch", "services", "asyncio")}

    def seconds() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qlorad.cli.main", "--help"], check=True, capture_output=True, cwd=ROOT)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.4
