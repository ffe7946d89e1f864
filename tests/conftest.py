"""What tests share: homes that hold a starter, houses that are closed, and a look for leaks at the end.

The starter is made once a session by the real daemon, for all processes that test side by side; a test
gets a home of its own whose store is hard-linked to it, which costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"  # before grpc: its fork handlers write to stderr
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
for _name in [n for n in os.environ if n.startswith("QLORAD_")]:
    del os.environ[_name]

# A runner in the background hands down an ignored Ctrl-C; the commands that tests start must hear theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import psutil
import pytest
from hypothesis import settings

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc, registry_pb2, registry_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from tests import house as houses
from tests.house import House, clone_store, eventually
from tests.samples import sample_rows, upload

MARK = "QLORAD_TEST_SESSION"

# The same examples every time, so that a run tells what changed; `--hypothesis-profile explore` looks further.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("steady")


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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """A home that the first of the processes of this session that needs it makes, and all share."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    home, done = root / f"shared-{name}", root / f"shared-{name}.done"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(home, ignore_errors=True)
            make(home)
            done.touch()
    return home


@pytest.fixture(scope="session")
def starter_home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A home whose store holds models/starter-test. Not to be written to: clone it."""

    def make(home: pathlib.Path) -> None:
        with houses.house(home) as house:
            house.start("registry")
            stub = registry_pb2_grpc.ModelServiceStub(house.channel("registry"))
            request = registry_pb2.MakeStarterModelRequest(request_id="starter", size=registry_pb2.STARTER_SIZE_TEST)
            last = list(stub.MakeStarterModel(request, timeout=170))[-1]
            assert last.model.state == registry_pb2.MODEL_STATE_READY

    return made_once(tmp_path_factory, "starter", make)


@pytest.fixture(scope="session")
def sample_home(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> pathlib.Path:
    """A home with models/starter-test and datasets/sample (48 rows, 8 of them for validation)."""

    def make(home: pathlib.Path) -> None:
        clone_store(starter_home, home)
        with houses.house(home) as house:
            house.start("datasets")
            stub = datasets_pb2_grpc.DatasetServiceStub(house.channel("datasets"))
            request = datasets_pb2.CreateDatasetRequest(
                request_id="sample",
                dataset_id="sample",
                uploads=[upload(stub, "sample.jsonl", sample_rows(48))],
                split=datasets_pb2.Split(validation_fraction=0.17, seed=7),
            )
            last = list(stub.CreateDataset(request, timeout=60))[-1]
            assert last.dataset.name == "datasets/sample"

    return made_once(tmp_path_factory, "sample", make)


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory, sample_home: pathlib.Path) -> pathlib.Path:
    """A home that also has adapters/sample, trained by the real trainer."""

    def make(home: pathlib.Path) -> None:
        clone_store(sample_home, home)
        with houses.house(home) as house:
            house.start("trainer")
            stub = trainer_pb2_grpc.TrainerServiceStub(house.channel("trainer"))
            train = trainer_pb2.TrainSpec(
                model="models/starter-test", dataset="datasets/sample", adapter="adapters/sample", seed=1
            )
            train.schedule.max_steps = 30
            train.optimizer.learning_rate = 5e-3
            train.data.max_length_tokens = 256
            made = stub.CreateJob(
                trainer_pb2.CreateJobRequest(request_id="trained", spec=trainer_pb2.JobSpec(train=train)), timeout=30
            )
            job = made.job
            for message in stub.WatchJob(trainer_pb2.WatchJobRequest(name=job.name), timeout=170):
                if message.HasField("snapshot"):
                    job = message.snapshot
            job = stub.GetJob(trainer_pb2.GetJobRequest(name=job.name), timeout=10).job
            assert job.state == trainer_pb2.JOB_STATE_SUCCEEDED, job

    return made_once(tmp_path_factory, "trained", make)


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


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: what was packed just now holds the time, and two processes would collect other tests."""
    return argname if isinstance(val, bytes) else None
