"""Two processes for one job: DeepSpeed ZeRO-2 over nf4, through the real service."""

from __future__ import annotations

import shutil

import pytest
from safetensors import safe_open

from qlorad.v1 import trainer_pb2
from services.common.shelf import Shelf
from tests.house import House
from tests.trainer.kit import MODEL, adapter_config, create, get, stub_of, watch


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its shared-memory part with g++")
def test_two_ranks_train_one_adapter(trainer: House) -> None:
    train = trainer_pb2.TrainSpec(model=MODEL, dataset="datasets/small", seed=3)
    train.lora.rank = 4
    train.data.max_length_tokens = train.data.micro_batch_tokens = 128
    train.schedule.max_steps, train.schedule.epochs = 0, 1.0
    train.optimizer.learning_rate = 5e-3
    stub = stub_of(trainer)
    job = create(stub, trainer_pb2.JobSpec(train=train), "ranks", template="zero2")
    events = list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED, (done.error.message, done.error.log_tail[-1500:])
    steps = [e.step.step for e in events if e.HasField("step")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3, "only rank 0 tells"
    told = [e.log.text for e in events if e.HasField("log") and "consumed" in e.log.text]
    assert len(told) == 1 and told[0].startswith("epoch 1 consumed what the ledger says: 12 rows"), told
    assert done.result.eval_loss_after < done.result.eval_loss_before
    alone = trainer_pb2.TrainSpec()
    alone.CopyFrom(train)
    alone.data.accumulation = 2
    solo = [
        e.step for e in watch(stub, create(stub, trainer_pb2.JobSpec(train=alone), "solo").name) if e.HasField("step")
    ]
    for one, two in zip(solo, (e.step for e in events if e.HasField("step")), strict=True):
        assert (one.tokens, one.trained_tokens, one.learning_rate) == (
            two.tokens,
            two.trained_tokens,
            two.learning_rate,
        )
        assert two.loss == pytest.approx(one.loss, rel=0.02), "one process over both micro-batches says the same"
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=0.1)
    config = adapter_config(trainer.home, done.result.adapter_digest)
    assert config["r"] == 4 and config["target_modules"] == ["q_proj", "v_proj"]
    payload = Shelf(trainer.home / "store").open("adapters", done.result.adapter_digest, verify=True).payload
    with safe_open(payload / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert len(names) == 2 * 2 * 2, "A and B of two modules in two layers"
        assert {str(tensors.get_tensor(n).dtype) for n in names} == {"torch.float32"}
        assert all(tensors.get_tensor(n).any() for n in names)
