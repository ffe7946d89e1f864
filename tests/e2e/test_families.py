"""Every family trains, is killed, resumes, is sealed, and (decoders) answers with its adapter."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers

from qlorad.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc, trainer_pb2
from services.common import process
from services.common.shelf import Shelf
from tests.house import House, clone_store, house
from tests.inference import kit as serving
from tests.trainer.kit import create, get, seal_dataset, small, stub_of, watch, worker_of

pytestmark = pytest.mark.slow
GROUPED = {"num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Phi": {},
    "Qwen2": GROUPED,
    "Gemma": {**GROUPED, "head_dim": 64},
    "GPTNeoX": {},
    "Bert": {},
}
STEPS = 30


def make(family: str, starter: pathlib.Path, folder: pathlib.Path) -> None:
    """A tiny model of random weights with the starter's tokenizer, as its users would find it on a hub."""
    import torch
    import transformers

    masked = family == "Bert"
    common = {"vocab_size": 2112, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(1)
    kind = getattr(transformers, f"{family}For{'MaskedLM' if masked else 'CausalLM'}")
    model = kind(getattr(transformers, f"{family}Config")(**{**common, "bos_token_id": None, **FAMILIES[family]}))
    model.save_pretrained(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(starter / name, folder / name)
    tokenizer = tokenizers.Tokenizer.from_file(str(starter / "tokenizer.json"))
    if masked:
        tokenizer.add_special_tokens(["[MASK]"])
        told = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**told, "mask_token": "[MASK]"}))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def home_of_all(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> Iterator[House]:
    """A trainer, a registry and an inference service over one home."""
    at = tmp_path_factory.mktemp("families") / "home"
    clone_store(starter_home, at)
    seal_dataset(at, "small", {"train": 48, "validation": 4})
    with house(at) as made:
        made.start("registry")
        made.start("trainer", "--retry-backoff-seconds", "0")
        made.start("inference")
        yield made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_answers(family: str, home_of_all: House, tmp_path: pathlib.Path) -> None:
    home, ident = home_of_all.home, family.lower()
    starter = Shelf(home / "store").open("models", "starter-test").payload
    make(family, starter, tmp_path / ident)
    models = registry_pb2_grpc.ModelServiceStub(home_of_all.channel("registry"))
    asked = registry_pb2.ImportModelRequest(request_id=ident, path=str(tmp_path / ident), model_id=ident)
    model = list(models.ImportModel(asked, timeout=170))[-1].model
    assert model.state == registry_pb2.MODEL_STATE_READY, model

    # Trains, and resumes where it was killed.
    trainer = stub_of(home_of_all)
    spec = small(STEPS, model=f"models/{ident}", adapter=f"adapters/{ident}", schedule__warmup_steps=2)
    spec.train.lora.rank, spec.train.optimizer.learning_rate = 16, 1e-2
    spec.train.checkpoints.every_steps = 5
    spec.train.quantization.method = trainer_pb2.QUANTIZATION_METHOD_NF4
    spec.train.quantization.double_quantization = True
    if family != "Bert":
        spec.train.lora.target_modules.names.append("all-linear")
    job = create(trainer, spec, ident, template="bert-mlm" if family == "Bert" else "standard")
    events = []
    for event in watch(trainer, job.name):
        events.append(event)
        if event.HasField("checkpoint_sealed") and event.attempt == 1:
            process.kill(worker_of(home, job.name), signal.SIGKILL)
            break
    events += watch(trainer, job.name, events[-1].sequence)
    ended = get(trainer, job.name)
    assert ended.state == trainer_pb2.JOB_STATE_SUCCEEDED, ended.error
    begun = [e.attempt_started.from_step for e in events if e.HasField("attempt_started")]
    assert begun[0] == 0 and len(begun) == 2 and begun[1] >= 5, begun
    losses = {e.step.step: e.step.loss for e in events if e.HasField("step")}
    assert sorted(losses) == list(range(1, STEPS + 1))
    first, last = (sum(losses[n] for n in steps) / 5 for steps in (range(1, 6), range(STEPS - 4, STEPS + 1)))
    assert last < 0.97 * first, (first, last)
    assert ended.result.eval_loss_after < ended.result.eval_loss_before

    # Answers with its adapter, or says why it cannot.
    stub = inference_pb2_grpc.InferenceServiceStub(home_of_all.channel("inference"))
    load = inference_pb2.LoadModelRequest(model=f"models/{ident}", precision=inference_pb2.PRECISION_FP32)
    if family == "Bert":
        said = serving.refused(lambda: stub.LoadModel(load, timeout=120))
        assert "BertForMaskedLM, which fills gaps and generates nothing" in said.message
        return
    stub.LoadModel(load, timeout=120)
    try:
        stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter=f"adapters/{ident}"), timeout=60)
        tuned = serving.generate(stub, "def add(a, b):", f"adapters/{ident}", max_tokens=8)
        plain = serving.generate(stub, "def add(a, b):", "base", max_tokens=8)
        assert tuned.ids and plain.ids and tuned.ids != plain.ids, "the adapter has an effect"
        assert tuned.started.adapter_digest == ended.result.adapter_digest
    finally:
        stub.UnloadModel(inference_pb2.UnloadModelRequest(request_id=f"unload-{ident}"), timeout=60)
