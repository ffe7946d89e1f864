"""Real kills: of the worker that makes a model, and of the daemon that waits for it."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import signal
import threading
import urllib.request

import grpc
import psutil
import pytest

from qlorad.v1 import registry_pb2
from services.common.shelf import Shelf
from tests.house import eventually
from tests.registry.doors import Doors, model_folder, open_doors, refusal


class Watch:
    """A call for a starter, read on a thread of its own."""

    def __init__(self, doors: Doors, request_id: str, model_id: str) -> None:
        self.stages: list[str] = []
        self.model: registry_pb2.Model | None = None
        self.error: grpc.RpcError | None = None
        request = registry_pb2.MakeStarterModelRequest(
            request_id=request_id, size=registry_pb2.STARTER_SIZE_TEST, model_id=model_id
        )
        self.call = doors.models.MakeStarterModel(request, timeout=120)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for update in self.call:
                if update.HasField("model"):
                    self.model = update.model
                else:
                    self.stages.append(update.progress.stage)
        except grpc.RpcError as error:
            self.error = error

    def reached(self, stage: str) -> None:
        eventually(lambda: stage in self.stages or self.error is not None, what=stage)
        assert self.error is None, self.error

    def ended(self) -> grpc.RpcError:
        """The error that it ended with."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.error is not None, self.model
        return self.error

    def refused(self) -> tuple[str, str, str]:
        """How it was refused."""
        error = self.ended()

        def again() -> None:
            raise error

        return refusal(again)


def workers_of(doors: Doors) -> list[psutil.Process]:
    daemon = psutil.Process(doors.house.daemons["registry"].pid)
    return [p for p in daemon.children() if "services.registry.worker" in p.cmdline()]


def metric(doors: Doors, sample: str) -> float:
    address = doors.house.daemons["registry"].told["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    assert found, f"{sample} is not in\n{text}"
    return float(found[1])


def test_a_lost_worker_fails_the_model_and_calling_again_starts_anew(home: pathlib.Path, house_factory) -> None:
    doors = open_doors(house_factory(home))
    watch = Watch(doors, "w1", "mine")
    watch.reached("load")
    other = Watch(doors, "w2", "mine")
    other.reached("load")
    worker = eventually(lambda: workers_of(doors))[0]
    assert doors.get("models/mine").state == registry_pb2.MODEL_STATE_PULLING
    assert metric(doors, 'qlorad_models{state="PULLING"}') == 1
    told = refusal(
        lambda: doors.models.DeleteModel(registry_pb2.DeleteModelRequest(request_id="d", name="models/mine"))
    )
    assert told[1] == "WRONG_STATE" and "READY, FAILED" in told[2]
    os.kill(worker.pid, signal.SIGKILL)
    for call in (watch, other):
        code, reason, message = call.refused()
        assert (code, reason) == ("UNAVAILABLE", "WORKER_LOST") and "SIGKILL" in message
    failed = doors.get("models/mine")
    assert failed.state == registry_pb2.MODEL_STATE_FAILED and "SIGKILL" in failed.error
    assert metric(doors, 'qlorad_models{state="FAILED"}') == 1
    assert not list((home / "store" / "staging").iterdir())
    again = Watch(doors, "w1", "mine")
    again.reached("load")
    assert doors.get("models/mine").state == registry_pb2.MODEL_STATE_PULLING
    assert eventually(lambda: workers_of(doors))[0].pid != worker.pid
    # SIGTERM while it is made: those who watch are told, the worker ends, the daemon ends well.
    assert doors.house.daemons["registry"].stop() == 0
    assert again.refused()[:2] == ("UNAVAILABLE", "SHUTTING_DOWN")
    doors = open_doors(doors.house)
    failed = doors.get("models/mine")
    assert failed.state == registry_pb2.MODEL_STATE_FAILED and "call again" in failed.error
    assert [m.name for m in doors.models.ListModels(registry_pb2.ListModelsRequest()).models] == [
        "models/mine",
        "models/starter-test",
    ]


def test_a_killed_daemon_leaves_no_worker_and_no_half_model(
    home: pathlib.Path, tmp_path: pathlib.Path, house_factory
) -> None:
    doors = open_doors(house_factory(home))
    watch = Watch(doors, "w1", "mine")
    watch.reached("load")
    worker = eventually(lambda: workers_of(doors))[0]
    doors.house.daemons["registry"].kill()
    assert watch.ended().code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, what="the worker's end")
    doors = open_doors(doors.house)
    assert doors.get("models/mine").state == registry_pb2.MODEL_STATE_FAILED
    assert Shelf(home / "store").alias("models", "mine") is None
    assert not list((home / "store" / "staging").iterdir())
    # The alias is free again, for the same request or for another source.
    folder = model_folder(home, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert doors.bring(folder, "mine").state == registry_pb2.MODEL_STATE_READY
    assert refusal(lambda: doors.make("w1", "mine"))[1] == "ALREADY_EXISTS"
    assert metric(doors, 'qlorad_models{state="FAILED"}') == 0
    assert metric(doors, 'qlorad_models{state="READY"}') == 2


def test_many_callers_of_one_request_get_one_model(home: pathlib.Path, tmp_path: pathlib.Path, house_factory) -> None:
    doors = open_doors(house_factory(home))
    folder = model_folder(home, tmp_path / "m")
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        told = list(pool.map(lambda _: doors.bring(folder, "many", "one-request"), range(20)))
    assert all(m == told[0] for m in told)
    log = (home / "logs" / "registry.log").read_text()
    assert log.count("begins: models/many") == 1
    doors.house.daemons["registry"].kill()
    doors = open_doors(doors.house)
    assert doors.bring(folder, "many", "one-request") == told[0]
    assert refusal(lambda: doors.bring(folder, "few", "one-request"))[1] == "REQUEST_ID_REUSED"


@pytest.mark.slow
def test_a_starter_tells_its_progress_and_its_metrics(tmp_path: pathlib.Path, house_factory) -> None:
    """Costs a whole starter: the one test that watches one being made from begin to end."""
    doors = open_doors(house_factory(tmp_path / "home"), "--starter-threads", "2")
    told = doors.make("r")
    shelf = Shelf(doors.home / "store")
    assert shelf.provenance(shelf.open("models", "starter-test"))["starter.test"]["threads"] == 2
    training = [u.progress for u in told if u.progress.stage == "train"]
    assert [p.done for p in training] == sorted({p.done for p in training})
    assert training[-1].done == training[-1].total == 300 and len(training) > 10
    assert all(3 < p.loss < 20 for p in training) and training[-1].loss < training[0].loss
    assert not any(u.progress.HasField("loss") for u in told if u.progress.stage != "train")
    stages = list(dict.fromkeys(u.progress.stage for u in told[:-1]))
    assert stages == ["wait", "load", "corpus", "tokenizer", "train", "write", "inspect", "seal"]
    assert metric(doors, 'qlorad_starter_seconds_count{size="test"}') == 1
    assert metric(doors, 'qlorad_starter_seconds_sum{size="test"}') < 120
    assert 3 < metric(doors, 'qlorad_starter_loss{size="test"}') < 7
    assert metric(doors, 'qlorad_shelf_bytes{collection="models"}') == told[-1].model.size_bytes
    assert metric(doors, "qlorad_adapters") == 0
