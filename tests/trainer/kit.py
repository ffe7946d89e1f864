"""What the trainer's tests share: a dataset on the shelf, specs, and a job's life seen from outside."""

from __future__ import annotations

import json
import pathlib
import random
import urllib.request
from collections.abc import Iterator

from qlorad.v1 import artifacts_pb2, datasets_pb2, messages_pb2, trainer_pb2, trainer_pb2_grpc
from services.common import shards
from services.common.prompt import example
from services.common.shelf import Sealed, Shelf
from tests.house import House

MODEL = "models/starter-test"
ENDED = (trainer_pb2.JOB_STATE_SUCCEEDED, trainer_pb2.JOB_STATE_FAILED, trainer_pb2.JOB_STATE_CANCELLED)


def chat(number: int) -> datasets_pb2.Example:
    """A small conversation."""
    draw = random.Random(number)
    a, b = draw.choice("abcdefgh"), draw.choice("xyz")
    body = f"def add({a}, {b}):\n    return {a} + {b}" + f"\n# {number}" * draw.randint(0, 12)
    turns = [
        messages_pb2.Message(role=messages_pb2.ROLE_USER, parts=[messages_pb2.Part(text=f"add {a} and {b}")]),
        messages_pb2.Message(role=messages_pb2.ROLE_ASSISTANT, parts=[messages_pb2.Part(text=body)]),
    ]
    origin = datasets_pb2.Origin(file="made.jsonl", line=number + 1)
    return datasets_pb2.Example(chat=messages_pb2.Conversation(messages=turns), origin=origin)


def seal_dataset(home: pathlib.Path, alias: str, rows: dict[str, int], first: int = 0) -> Sealed:
    """Lays a dataset of made conversations on the shelf of a home."""
    shelf = Shelf(home / "store")
    staged = shelf.stage()
    for split, count in rows.items():
        with shards.ShardWriter(staged.payload, split) as writer:
            for number in range(count):
                writer.add(example.dumps(chat(first + number + (1000 if split == "validation" else 0))))
    (staged.payload / "findings.jsonl").write_bytes(b"")
    sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_DATASET, {"made": "for a test"})
    shelf.set_alias("datasets", alias, sealed.digest)
    return sealed


def small(steps: int = 4, **fields: object) -> trainer_pb2.JobSpec:
    """A job of seconds."""
    train = trainer_pb2.TrainSpec(model=MODEL, dataset="datasets/small", threads=1, seed=7)
    train.lora.rank = 4
    train.lora.dropout = 0.1
    train.data.max_length_tokens = 128
    train.data.micro_batch_tokens = 256
    train.optimizer.learning_rate = 5e-3
    train.schedule.max_steps = steps
    train.checkpoints.every_steps = 2
    train.limits.max_attempts = 50
    for path, value in fields.items():
        message = train
        *groups, last = path.split("__")
        for group in groups:
            message = getattr(message, group)
        setattr(message, last, value)
    return trainer_pb2.JobSpec(train=train)


def stub_of(house: House) -> trainer_pb2_grpc.TrainerServiceStub:
    """A stub to a house's trainer."""
    return trainer_pb2_grpc.TrainerServiceStub(house.channel("trainer"))


def create(
    stub: trainer_pb2_grpc.TrainerServiceStub, spec: trainer_pb2.JobSpec, request_id: str, **more: object
) -> trainer_pb2.Job:
    """Makes a job."""
    request = trainer_pb2.CreateJobRequest(request_id=request_id, spec=spec, **more)
    return stub.CreateJob(request, timeout=20).job


def watch(stub: trainer_pb2_grpc.TrainerServiceStub, name: str, after: int = 0) -> Iterator[trainer_pb2.Event]:
    """Events of a job to its end."""
    for update in stub.WatchJob(trainer_pb2.WatchJobRequest(name=name, after_sequence=after), timeout=170):
        if update.HasField("event"):
            yield update.event


def get(stub: trainer_pb2_grpc.TrainerServiceStub, name: str) -> trainer_pb2.Job:
    """A job as it is now."""
    return stub.GetJob(trainer_pb2.GetJobRequest(name=name), timeout=20).job


def facts(events: list[trainer_pb2.Event]) -> list[str]:
    """Kinds of events, states by name."""
    found = []
    for event in events:
        kind = event.WhichOneof("fact")
        if kind == "state_changed":
            kind = trainer_pb2.JobState.Name(event.state_changed.to).removeprefix("JOB_STATE_")
        found.append(kind)
    return found


def adapter_files(home: pathlib.Path, digest: str) -> dict[str, bytes]:
    """The payload of an adapter."""
    payload = Shelf(home / "store").open("adapters", digest, verify=True).payload
    return {p.name: p.read_bytes() for p in sorted(payload.iterdir())}


def adapter_config(home: pathlib.Path, digest: str) -> dict[str, object]:
    """adapter_config.json of an adapter."""
    told: dict[str, object] = json.loads(adapter_files(home, digest)["adapter_config.json"])
    return told


def metric(house: House, name: str) -> float:
    """A series without labels of the trainer's /metrics."""
    url = f"http://{house.daemons['trainer'].told['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    raise AssertionError(f"no {name}")


def worker_of(home: pathlib.Path, name: str) -> int:
    """Pid of the process that runs the newest attempt of a job."""
    folder = home / "state" / "jobs" / name.removeprefix("jobs/") / "attempts"
    newest = folder / str(max(int(p.name) for p in folder.iterdir()))
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(newest).encode() in words:
            return int(entry.name)
    raise AssertionError("no worker runs")
