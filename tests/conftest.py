"""What tests share: homes that hold a starter, houses that are closed, and a look for leaks at the end.

The starter is made once a session by the real daemon; a test gets a home
of its own whose store is hard-linked to it, which costs nothing.
"""

from __future__ import annotations

import os
import pathlib
import signal
import uuid
from collections.abc import Callable, Iterator

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"  # before grpc: its fork handlers write to stderr
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
for _name in [n for n in os.environ if n.startswith("QLORAD_")]:
    del os.environ[_name]

import psutil
import pytest

from qlorad.v1 import registry_pb2, registry_pb2_grpc
from tests import house as houses
from tests.house import House, clone_store, eventually

MARK = "QLORAD_TEST_SESSION"


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Every process that a test started, and its children, must have ended with the session."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    yield

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    found.append(process)
            except psutil.Error:
                continue
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    try:
        eventually(lambda: not left(), seconds=20, what="the end of every process that tests started")
    except AssertionError:
        told = [f"{p.pid} {' '.join(p.cmdline())}" for p in left()]
        for process in left():
            process.send_signal(signal.SIGKILL)
        pytest.fail("left running:\n" + "\n".join(told))


@pytest.fixture(scope="session")
def starter_home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A home whose store holds models/starter-test. Not to be written to: clone it."""
    home = tmp_path_factory.mktemp("starter") / "home"
    with houses.house(home) as house:
        house.start("registry")
        stub = registry_pb2_grpc.ModelServiceStub(house.channel("registry"))
        request = registry_pb2.MakeStarterModelRequest(request_id="starter", size=registry_pb2.STARTER_SIZE_TEST)
        last = list(stub.MakeStarterModel(request, timeout=170))[-1]
        assert last.model.state == registry_pb2.MODEL_STATE_READY
    return home


@pytest.fixture
def home(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> pathlib.Path:
    """A fresh home with models/starter-test."""
    fresh = tmp_path / "home"
    clone_store(starter_home, fresh)
    return fresh


@pytest.fixture
def house_factory() -> Iterator[Callable[[pathlib.Path], House]]:
    """Makes houses that are closed after the test."""
    made: list[House] = []

    def make(home: pathlib.Path) -> House:
        made.append(House(home))
        return made[-1]

    yield make
    for house in made:
        house.close()
