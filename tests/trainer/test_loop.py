"""A job from its creation to its adapter, through the door."""

from __future__ import annotations

import concurrent.futures
import os
import signal

import pytest

from qlorad.v1 import messages_pb2, trainer_pb2
from services.common.facts import AdapterFacts, from_manifest
from services.common.prompt import formats, ledger, tally
from services.common.shelf import Shelf
from tests.house import House
from tests.inference import kit as inference
from tests.trainer.kit import adapter_config, create, facts, get, small, stub_of, watch, worker_of


def test_a_job_trains_and_seals_its_adapter(trainer: House) -> None:
    """Two whole epochs in a prompt format; P27: what was consumed is what the ledger says."""
    stub = stub_of(trainer)
    spec = small(
        0,
        adapter="adapters/made",
        evaluation__every_steps=2,
        schedule__epochs=2.0,
        data__prompt_format=messages_pb2.PROMPT_FORMAT_CHATML,
        data__accumulation=2,
        generation__temperature=0.25,
        generation__max_tokens=40,
    )
    job = create(stub, spec, "one", labels={"a": "b"})
    assert job.state == trainer_pb2.JOB_STATE_QUEUED and not job.is_terminal
    assert job.spec.train.model.startswith("models/sha256:") and job.spec.train.dataset.startswith("datasets/sha256:")
    events = list(watch(stub, job.name))
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED, done
    told = facts(events)
    states = [f for f in told if f.isupper()]
    assert states == ["QUEUED", "PREPARING", "RUNNING", "FINALIZING", "SUCCEEDED"]
    (planned,) = [e.planned for e in events if e.HasField("planned")]
    steps = [e.step for e in events if e.HasField("step")]
    total = planned.total_steps
    assert total >= 4 and total % 2 == 0 and [s.step for s in steps] == list(range(1, total + 1))
    even = list(range(2, total + 1, 2))
    assert [e.evaluated.step for e in events if e.HasField("evaluated")] == [0, *even]
    assert [e.checkpoint_sealed.step for e in events if e.HasField("checkpoint_sealed")] == even
    found = {e.evaluated.step: e.evaluated.loss for e in events if e.HasField("evaluated")}
    sealed_at = [e.checkpoint_sealed for e in events if e.HasField("checkpoint_sealed")]
    assert all(c.eval_loss == found[c.step] for c in sealed_at), "evaluated first, then written"
    assert done.result.best_eval_loss == min(found[n] for n in even) == found[done.result.best_step]
    assert planned.chosen.accumulation == 2 and planned.chosen.micro_batch_tokens == 256
    assert done.end == trainer_pb2.END_REASON_STEPS and done.last_sequence == len(events)
    assert done.result.adapter == "adapters/made" and done.result.eval_loss_after < done.result.eval_loss_before
    assert done.result.steps == total and done.result.tokens == sum(s.tokens for s in steps)
    assert adapter_config(trainer.home, done.result.adapter_digest)["target_modules"] == ["q_proj", "v_proj"]

    (counts,) = [s for s in planned.ledger.splits if s.split == "train"]
    for epoch in (1, 2):
        ended = [s for s in steps if epoch - 1 < s.epoch <= epoch]
        assert sum(s.tokens for s in ended) == counts.tokens
        assert sum(s.trained_tokens for s in ended) == counts.trained_tokens
    shelf = Shelf(trainer.home / "store")
    rows = ledger.LedgerReader.open(shelf.open("datasets", planned.ledger.digest)).split("train")
    number = tally.text_of(rows.rows_number())
    lines = [e.log.text for e in events if e.HasField("log") and "consumed" in e.log.text]
    assert [line.partition(":")[0] for line in lines] == [f"epoch {n} consumed what the ledger says" for n in (1, 2)]
    assert all(f"{counts.rows} rows, {counts.tokens} tokens" in line and number in line for line in lines)

    sealed = shelf.open("adapters", done.result.adapter_digest)
    known = from_manifest(AdapterFacts, sealed.manifest)
    assert known.prompt_format == "PROMPT_FORMAT_CHATML" == messages_pb2.PromptFormat.Name(planned.ledger.prompt_format)
    assert known.generation == {"temperature": 0.25, "max_tokens": 40}
    digest = formats.template_digest(messages_pb2.PROMPT_FORMAT_CHATML, "")
    assert sealed.manifest.lineage.template_digest == planned.ledger.template_digest == digest
    assert all("<|im_start|>" in entry["text"] for entry in known.golden)


def test_rows_that_are_too_long_fail_the_job_by_name(trainer: House) -> None:
    stub = stub_of(trainer)
    job = create(stub, small(data__max_length_tokens=16), "long")
    events = list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_FAILED and done.error.reason == "BAD_DATA"
    assert "made.jsonl:" in done.error.message and "at most 16 tokens" in done.error.message
    assert [f for f in facts(events) if f.isupper()] == ["QUEUED", "PREPARING", "FAILED"]


def test_a_worker_lost_too_often_fails_the_job(trainer: House) -> None:
    stub = stub_of(trainer)
    job = create(stub, small(steps=100_000, limits__max_attempts=1, evaluation__max_rows=1), "lost")
    for event in watch(stub, job.name):
        if event.HasField("step") and event.step.step == 2:
            os.kill(worker_of(trainer.home, job.name), signal.SIGKILL)
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_FAILED and done.error.reason == "WORKER_LOST"
    assert "SIGKILL" in done.error.message


@pytest.mark.slow
def test_a_time_limit_ends_a_job_well(trainer: House) -> None:
    stub = stub_of(trainer)
    job = create(stub, small(steps=1_000_000, limits__max_seconds=30, checkpoints__every_steps=0), "limit")
    events = list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED and done.end == trainer_pb2.END_REASON_TIME_LIMIT
    assert done.result.adapter_digest and done.result.steps == max(e.step.step for e in events)


def test_padding_and_lora_without_quantisation_train_too(trainer: House) -> None:
    stub = stub_of(trainer)
    spec = small(
        data__packing=False,
        data__length_grouping=True,
        data__step_tokens=250,
        quantization__method=trainer_pb2.QUANTIZATION_METHOD_NONE,
        quantization__compute_type=trainer_pb2.COMPUTE_TYPE_FP32,
        schedule__max_steps=0,
        schedule__epochs=1.5,
        lora__rslora=True,
        memory__gradient_checkpointing=True,
        optimizer__kind=trainer_pb2.OPTIMIZER_KIND_SGD,
        optimizer__momentum=0.5,
        checkpoints__every_steps=2,
    )
    job = create(stub, spec, "padded")
    assert job.spec.train.data.accumulation == 0
    events = list(watch(stub, job.name))
    (planned,) = [e.planned for e in events if e.HasField("planned")]
    assert get(stub, job.name).spec.train.data.accumulation == planned.chosen.accumulation >= 2, "it stands there now"
    last = [e.step for e in events if e.HasField("step")][-1]
    assert facts(events)[-1] == "SUCCEEDED"
    assert last.step == last.total_steps and 1 < last.epoch <= 2


@pytest.mark.slow
def test_what_is_trained_as_dora_answers_as_dora(trainer: House) -> None:
    """Train, publish, load; in one batch with the base it says what it says alone."""
    stub = stub_of(trainer)
    spec = small(4, adapter="adapters/sized", lora__dora=True, optimizer__learning_rate=0.01)
    job = create(stub, spec, "sized")
    list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED, done
    assert adapter_config(trainer.home, done.result.adapter_digest)["use_dora"] is True
    assert from_manifest(AdapterFacts, Shelf(trainer.home / "store").open("adapters", "sized").manifest).dora
    _, serving = inference.start(trainer)
    inference.load(serving, "sized")
    asks = ["base", "adapters/sized", "base", "adapters/sized"]
    alone = [inference.generate(serving, "def add(a, b):\n", name, max_tokens=16).ids for name in asks]
    with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
        mixed = pool.map(lambda name: inference.generate(serving, "def add(a, b):\n", name, max_tokens=16).ids, asks)
        assert list(mixed) == alone
