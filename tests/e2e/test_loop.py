"""The whole loop through the four doors, with tokens; then a look at what lies about."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from qlorad.v1 import (
    artifacts_pb2,
    datasets_pb2,
    datasets_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from services.common.shelf import Shelf
from tests import promtool
from tests.contract import reference
from tests.house import House, clone_store, house
from tests.samples import sample_rows, upload

TOKEN = "qlt_c4n4ry-loop-0123456789"
PROMPT = "write a function that can add numbers"


class WithToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Shows the token at every call."""

    def _call(self, proceed: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {TOKEN}")]
        return proceed(details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _call


@dataclass
class Loop:
    """What the loop gave."""

    house: House
    home: pathlib.Path
    job: trainer_pb2.Job = field(default_factory=trainer_pb2.Job)
    events: list[trainer_pb2.Event] = field(default_factory=list)
    while_training: str = ""
    answers: dict[str, tuple[list[int], str]] = field(default_factory=dict)

    def channel(self, service: str) -> grpc.Channel:
        return grpc.intercept_channel(self.house.channel(service), WithToken())


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> Iterator[Loop]:
    folder = tmp_path_factory.mktemp("loop")
    home = folder / "home"
    clone_store(starter_home, home)
    tokens = folder / "tokens"
    tokens.write_text(hashlib.sha256(TOKEN.encode()).hexdigest() + " ann\n")
    with house(home) as made:
        for service in reference.SERVICES:
            made.start(service, "--tokens-file", str(tokens))
        loop = Loop(made, home)
        _models(loop)
        _dataset(loop)
        _job(loop)
        _answers(loop)
        yield loop
        assert [d.stop() for d in made.daemons.values()] == [0, 0, 0, 0]


def _models(loop: Loop) -> None:
    stub = registry_pb2_grpc.ModelServiceStub(loop.channel("registry"))
    answer = stub.ListModels(registry_pb2.ListModelsRequest(), timeout=10)
    assert [m.name for m in answer.models] == ["models/starter-test"]


def _dataset(loop: Loop) -> None:
    stub = datasets_pb2_grpc.DatasetServiceStub(loop.channel("datasets"))
    request = datasets_pb2.CreateDatasetRequest(
        request_id="sample",
        dataset_id="sample",
        uploads=[upload(stub, "sample.jsonl", sample_rows(48))],
        split=datasets_pb2.Split(validation_fraction=0.17, seed=7),
    )
    assert list(stub.CreateDataset(request, timeout=60))[-1].dataset.name == "datasets/sample"


def _job(loop: Loop) -> None:
    stub = trainer_pb2_grpc.TrainerServiceStub(loop.channel("trainer"))
    train = trainer_pb2.TrainSpec(model="models/starter-test", dataset="datasets/sample", adapter="adapters/sample")
    train.schedule.max_steps = 40
    train.schedule.kind = trainer_pb2.SCHEDULE_KIND_CONSTANT
    train.optimizer.learning_rate = 5e-3
    train.data.max_length_tokens = 256
    train.lora.target_modules.names.append("all-linear")
    request = trainer_pb2.CreateJobRequest(request_id="loop", job_id="loop", spec=trainer_pb2.JobSpec(train=train))
    job = stub.CreateJob(request, timeout=30).job
    for update in stub.WatchJob(trainer_pb2.WatchJobRequest(name=job.name), timeout=170):
        if update.HasField("event"):
            loop.events.append(update.event)
            if update.event.HasField("step") and update.event.step.step == 20:
                loop.while_training = reference.scrape(loop.house, "trainer")
    loop.job = stub.GetJob(trainer_pb2.GetJobRequest(name=job.name), timeout=10).job


def _answers(loop: Loop) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(loop.channel("inference"))
    load = inference_pb2.LoadModelRequest(
        request_id="l", model="models/starter-test", precision=inference_pb2.PRECISION_FP32
    )
    stub.LoadModel(load, timeout=120)
    stub.LoadAdapter(inference_pb2.LoadAdapterRequest(request_id="a", adapter="adapters/sample"), timeout=120)
    for adapter in ("base", "adapters/sample"):
        options = inference_pb2.GenerationOptions(max_tokens=24)
        request = inference_pb2.GenerateRequest(adapter=adapter, prompt=PROMPT, options=options)
        ids: list[int] = []
        text = ""
        for answer in stub.Generate(request, timeout=60):
            ids += answer.delta.ids
            text += answer.delta.text
        loop.answers[adapter] = (ids, text)


def test_the_job_learned(loop: Loop) -> None:
    result = loop.job.result
    assert loop.job.state == trainer_pb2.JOB_STATE_SUCCEEDED, loop.job.error
    assert result.adapter_digest.startswith("sha256:") and result.adapter == "adapters/sample"
    assert result.eval_loss_after < 0.7 * result.eval_loss_before
    assert [e.sequence for e in loop.events] == list(range(1, loop.job.last_sequence + 1))


def test_base_and_tuned_answer_differently(loop: Loop) -> None:
    base, tuned = loop.answers["base"], loop.answers["adapters/sample"]
    assert base[0] and tuned[0] and base != tuned


PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(base)(prompt, add_special_tokens=False, return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
steps = []
with torch.no_grad():
    for _ in range(24):
        logits = model(ids).logits[0, -1]
        top = logits.topk(2)
        steps.append((int(top.indices[0]), float(top.values[0] - top.values[1])))
        ids = torch.cat([ids, top.indices[:1].view(1, 1)], 1)
print(json.dumps(steps))
"""


def test_plain_peft_gives_the_same_tokens(loop: Loop) -> None:
    """Token-equal as PROMISES tell it: wherever the margin of the oracle is above 1e-4."""
    shelf = Shelf(loop.home / "store")
    base = shelf.open("models", "starter-test", verify=True).payload
    adapter = shelf.open("adapters", "sample", verify=True)
    assert sorted(p.name for p in adapter.payload.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(base), str(adapter.payload), PROMPT],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    oracle = json.loads(done.stdout.splitlines()[-1])
    ours = loop.answers["adapters/sample"][0]
    assert len(ours) >= 5
    for mine, (theirs, margin) in zip(ours, oracle, strict=False):
        if mine != theirs:
            assert margin <= 1e-4
            break  # from here on the two read different texts


def test_metrics_told_of_the_running_job(loop: Loop) -> None:
    for name in ("qlorad_job_loss{", "qlorad_job_tokens{", 'qlorad_jobs{state="RUNNING"} 1.0'):
        assert name in loop.while_training
    told = {s: reference.scrape(loop.house, s) for s in reference.SERVICES}
    for text in told.values():
        ends = [line for line in text.splitlines() if line.startswith("grpc_server_handled_total")]
        assert ends and not [e for e in ends if 'grpc_code="INTERNAL"' in e or 'grpc_code="UNKNOWN"' in e]
    for name in ("qlorad_inference_generated_tokens_total", "qlorad_inference_first_token_seconds_count"):
        lines = [line for line in told["inference"].splitlines() if line.startswith(name)]
        assert lines and sum(float(line.rsplit(" ", 1)[1]) for line in lines) > 0


def test_no_secret_lies_about(loop: Loop) -> None:
    """P23 over the whole loop: events, metrics, logs, databases, every file of the home."""
    texts = [str(e) for e in loop.events] + [reference.scrape(loop.house, s) for s in reference.SERVICES]
    files = [p for p in loop.home.rglob("*") if p.is_file() and "payload" not in p.parts]
    assert len(files) > 15 and any(p.suffix == ".sqlite" for p in files)
    texts += [p.read_bytes().decode(errors="replace") for p in files]
    assert not [t[:200] for t in texts if "c4n4ry" in t]


def test_the_shelf_is_whole_and_nothing_is_left_aside(loop: Loop) -> None:
    shelf = Shelf(loop.home / "store")
    for kind, least in (
        (artifacts_pb2.ARTIFACT_KIND_MODEL, 1),
        (artifacts_pb2.ARTIFACT_KIND_DATASET, 1),
        (artifacts_pb2.ARTIFACT_KIND_LEDGER, 1),
        (artifacts_pb2.ARTIFACT_KIND_ADAPTER, 1),
        (artifacts_pb2.ARTIFACT_KIND_CHECKPOINT, 1),
    ):
        found = shelf.every(kind)
        assert len(found) >= least
        for sealed in found:
            collection = sealed.folder.parent.name
            shelf.open(collection, sealed.digest, verify=True)
    assert list((loop.home / "store" / "staging").iterdir()) == []


@pytest.mark.parametrize("service", reference.SERVICES)
def test_no_daemon_grew_or_loaded_torch(loop: Loop, service: str) -> None:
    import psutil

    process = psutil.Process(loop.house.daemons[service].pid)
    assert process.memory_info().rss < 100 << 20
    assert not [m.path for m in process.memory_maps() if "torch" in m.path]


def test_without_the_token_nobody_comes_in(loop: Loop) -> None:
    stub = trainer_pb2_grpc.TrainerServiceStub(loop.house.channel("trainer"))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_metrics_after_the_loop_pass_promtool(loop: Loop) -> None:
    promtool.check(loop.while_training)
    for service in reference.SERVICES:
        promtool.check(reference.scrape(loop.house, service))
