"""Several processes for one job: DeepSpeed ZeRO against one process, through the service and by the worker alone."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from safetensors import safe_open

from qlorad.v1 import artifacts_pb2
from qlorad.v1 import trainer_pb2 as pb
from services.common import facts as known
from services.common import frames
from services.common.extensions import extensions_folder
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import launch, spec
from services.trainer.app import TEMPLATES, read_templates
from services.trainer.worker.ranks import outcome
from tests.house import ROOT, House
from tests.trainer.kit import MODEL, adapter_config, create, get, small, stub_of, watch
from tests.trainer.test_pause import pause, resume, until

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXTENSIONS = str(extensions_folder("", sys.prefix))
COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its shared-memory part with g++")
STEPS = 20


def ranked(template: str = "zero2", **fields: object) -> pb.TrainSpec:
    """A spec as the daemon would resolve it, on datasets/small."""
    override = small(STEPS, lora__dropout=0.0, **fields)
    override.train.data.micro_batch_tokens = 128
    model = spec.ModelKnown("", 256, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    found = spec.resolve(
        read_templates(TEMPLATES)[template], override, model, spec.DatasetKnown("", {"train": 9, "validation": 2}),
        spec.Host("cpu", 4),
    )  # fmt: skip
    assert not found.violations, found.violations
    return found.spec.train


@pytest.mark.parametrize(
    ("name", "template", "device", "fields"),
    [
        ("zero2", "zero2", "cpu", {}),
        ("zero3-offload", "zero3-offload", "cpu", {"data__accumulation": 4}),
        ("zero1-optimizer-offload-cuda", "zero2", "cuda",
         {"parallelism__zero_stage": 1, "parallelism__offload": pb.OFFLOAD_OPTIMIZER, "optimizer__max_grad_norm": 0.0}),
        ("zero2-two-by-eight", "zero2", "cuda", {"parallelism__ranks": 16, "data__accumulation": 2}),
        ("zero3-two-by-eight", "zero3", "cuda", {"parallelism__ranks": 16}),
    ],
)  # fmt: skip
def test_deepspeed_is_told_what_the_spec_says(name: str, template: str, device: str, fields: dict[str, Any]) -> None:
    """A change of a golden file is a change of what every such job does: look at it."""
    told = json.dumps(launch.deepspeed_of(ranked(template, **fields), device), indent=1) + "\n"
    assert told == (GOLDEN / f"deepspeed-{name}.json").read_text()


def test_a_lost_rank_is_a_loss_whatever_the_others_say() -> None:
    def failed(reason: str, second: int) -> training_pb2.Fact:
        fact = training_pb2.Fact(failed=pb.JobError(reason=reason))
        fact.time.seconds = second
        return fact

    missed, full = failed("INTERNAL", 6), failed("DISK_FULL", 5)
    line, told = outcome([1, -9], [missed])
    assert told is None and "rank 1 was ended by signal 9" in line, "rank 0 only saw that rank 1 was gone"
    assert outcome([1, 1], [missed, full]) == ("", full), "the first is the cause"
    assert outcome([None, 1], [full]) == ("", full), "rank 0 has told nothing yet"
    assert outcome([0, 1], [missed]) == ("", None), "rank 0 has told how it ended"
    assert outcome([1, None], []) == ("", None)


@COMPILED
def test_two_ranks_train_one_adapter(trainer: House) -> None:
    train = pb.TrainSpec(model=MODEL, dataset="datasets/small", seed=3)
    train.lora.rank = 4
    train.data.max_length_tokens = train.data.micro_batch_tokens = 128
    train.schedule.max_steps, train.schedule.epochs = 0, 1.0
    train.checkpoints.every_steps = 2
    train.optimizer.learning_rate = 5e-3
    stub = stub_of(trainer)
    job = create(stub, pb.JobSpec(train=train), "ranks", template="zero2")
    events = list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == pb.JOB_STATE_SUCCEEDED, (done.error.message, done.error.log_tail[-1500:])
    steps = [e.step.step for e in events if e.HasField("step")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3, "only rank 0 tells"
    told = [e.log.text for e in events if e.HasField("log") and "consumed" in e.log.text]
    assert len(told) == 1 and told[0].startswith("epoch 1 consumed what the ledger says: 12 rows"), told
    assert not any(e.HasField("fallback") for e in events), "trained weights are fp32 here too"
    assert done.result.eval_loss_after < done.result.eval_loss_before
    config = adapter_config(trainer.home, done.result.adapter_digest)
    assert config["r"] == 4 and config["target_modules"] == ["q_proj", "v_proj"]
    shelf = Shelf(trainer.home / "store")
    sealed = shelf.open("adapters", done.result.adapter_digest, verify=True)
    with safe_open(sealed.payload / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert len(names) == 2 * 2 * 2, "A and B of two modules in two layers"
        assert {str(tensors.get_tensor(n).dtype) for n in names} == {"torch.float32"}
        assert all(tensors.get_tensor(n).any() for n in names)

    kept = shelf.open("checkpoints", done.result.checkpoint_digest, verify=True)
    parts = [f"{kind}-0000{n}-of-00002.safetensors" for kind in ("optimizer", "rng") for n in (1, 2)]
    plain = ["adapter.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert sorted(f.path for f in kept.manifest.files) == [*plain, *parts, "state.json"]
    staged = shelf.stage()  # as someone without torch would publish it
    shutil.copytree(kept.payload / "adapter", staged.payload, dirs_exist_ok=True)
    about = json.loads((kept.payload / "adapter.json").read_text())
    lineage = artifacts_pb2.Lineage(**about["lineage"])
    again = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_ADAPTER, about["facts"], lineage)
    assert again.digest == sealed.digest, "the last checkpoint holds the very adapter of the job's end"
    assert known.from_manifest(known.AdapterFacts, again.manifest).golden


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """What a worker told, and the folder of its attempt."""

    folder: pathlib.Path
    facts: list[training_pb2.Fact]

    @property
    def losses(self) -> dict[int, float]:
        return {f.step.step: f.step.loss for f in self.facts if f.HasField("step")}

    @property
    def held(self) -> float:
        """The share of the weights that rank 0 holds, as it says."""
        (line,) = [f.log.text for f in self.facts if f.HasField("log") and "each holds" in f.log.text]
        own, whole = re.findall(r"holds (\d+) of (\d+) bytes", line)[0]
        return int(own) / int(whole)

    def tensors(self, file: str = "adapter/adapter_model.safetensors") -> dict[str, Any]:
        with safe_open(self.folder / file, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}

    def checkpoint(self, home: pathlib.Path, step: int) -> str:
        """The digest of a checkpoint, sealed as the daemon would."""
        shelf = Shelf(home / "store")
        staged = shelf.stage()
        shutil.copytree(self.folder / "checkpoints" / str(step), staged.payload, dirs_exist_ok=True)
        return shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_CHECKPOINT, {}).digest


def work(home: pathlib.Path, name: str, train: pb.TrainSpec, checkpoint: str = "", **more: float) -> Ran:
    """Runs the real worker to its end, without a daemon."""
    shelf, folder = Shelf(home / "store"), home / "attempts" / name
    train.model = f"models/{shelf.resolve('models', MODEL.removeprefix('models/'))}"
    train.dataset = f"datasets/{shelf.resolve('datasets', 'small')}"
    folder.mkdir(parents=True)
    order = training_pb2.Order(
        job="same", attempt=1, spec=train, store=str(home / "store"), device="cpu", checkpoint_digest=checkpoint, **more
    )
    (folder / launch.ORDER).write_bytes(order.SerializeToString())
    argv = [sys.executable, "-m", launch.module_of(train), "--attempt", str(folder)]
    environ = {**os.environ, **launch.environ_of(train, EXTENSIONS)}
    ended = subprocess.run(argv, env=environ, cwd=ROOT, timeout=170, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    bodies, _ = frames.unpack_all((folder / launch.FACTS).read_bytes())
    return Ran(folder, [training_pb2.Fact.FromString(body) for body in bodies])


def alone(train: pb.TrainSpec) -> pb.TrainSpec:
    """The same steps in one process."""
    one = pb.TrainSpec()
    one.CopyFrom(train)
    one.data.accumulation *= train.parallelism.ranks
    one.parallelism.Clear()
    one.parallelism.ranks, one.parallelism.zero_stage = 1, 0
    return one


def cosine(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Of what two adapters add to the base, at the module where it is least."""
    import torch

    found = []
    for name in (n for n in left if ".lora_A." in n):
        b = name.replace(".lora_A.", ".lora_B.")
        products = [(t[b] @ t[name]).flatten() for t in (left, right)]
        found.append(float(torch.nn.functional.cosine_similarity(*products, dim=0)))
    return min(found)


STAGES = {
    "zero1": {"parallelism__zero_stage": 1},
    "zero2": {},
    "zero3": {"parallelism__zero_stage": 3},
    "zero2-offload": {"parallelism__offload": pb.OFFLOAD_OPTIMIZER},
    "zero3-offload": {"parallelism__zero_stage": 3, "parallelism__offload": pb.OFFLOAD_ALL},
}


@pytest.mark.slow
@COMPILED
def test_plain_descent_in_fp32_is_that_of_one_process(small_home: pathlib.Path) -> None:
    fields: dict[str, Any] = {
        "quantization__method": pb.QUANTIZATION_METHOD_NONE, "quantization__compute_type": pb.COMPUTE_TYPE_FP32,
        "optimizer__kind": pb.OPTIMIZER_KIND_SGD, "optimizer__learning_rate": 0.2, "optimizer__momentum": 0.5,
    }  # fmt: skip
    one = work(small_home, "alone", alone(ranked(**fields)))
    for name, stage in STAGES.items():
        two = work(small_home, name, ranked(**fields, **stage))
        for key, tensor in one.tensors().items():
            assert float((tensor - two.tensors()[key]).abs().max()) < 1e-5, (name, key)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_adamw_over_a_base_of_few_bits_is_near_that_of_one_process(small_home: pathlib.Path, method: str) -> None:
    fields: dict[str, Any] = {"optimizer__learning_rate": 2e-3}
    if method == "none":
        fields["quantization__method"] = pb.QUANTIZATION_METHOD_NONE
    one = work(small_home, "alone", alone(ranked(**fields)))
    for name in ("zero2", "zero3"):
        two = work(small_home, name, ranked(**fields, **STAGES[name]))
        assert sorted(two.losses) == sorted(one.losses) == list(range(1, STEPS + 1))
        for step, loss in one.losses.items():
            assert two.losses[step] == pytest.approx(loss, rel=0.005), (name, step)
        assert cosine(one.tensors(), two.tensors()) >= 0.98, name


@pytest.mark.slow
@COMPILED
def test_a_checkpoint_is_read_by_any_number_of_ranks(small_home: pathlib.Path) -> None:
    """Written by two ranks (ZeRO-2) and by one; read by one, two and three, under ZeRO-1, 2 and 3."""
    train = ranked(optimizer__learning_rate=2e-3, checkpoints__every_steps=10)
    two = work(small_home, "two", train)
    middle = two.checkpoint(small_home, 10)
    again = work(small_home, "two-two", train, middle)
    assert again.losses == {step: loss for step, loss in two.losses.items() if step > 10}, "to the bit"
    assert again.tensors().keys() == two.tensors().keys()
    assert all(t.equal(again.tensors()[name]) for name, t in two.tensors().items())

    one = work(small_home, "two-one", alone(train), middle)
    begun = work(small_home, "one", alone(train))
    others = {
        "one-two": work(small_home, "one-two", train, begun.checkpoint(small_home, 10)),
        "two-zero3": work(small_home, "two-zero3", ranked("zero3-offload", optimizer__learning_rate=2e-3), middle),
        "two-one": one,
    }
    assert others["two-zero3"].held == pytest.approx(0.5, abs=0.01) and two.held == 1, "what ZeRO-3 divides"
    for name, other in others.items():
        assert min(other.losses) == 11, name
        for step, loss in other.losses.items():
            assert loss == pytest.approx(two.losses[step], rel=0.005), (name, step)
        assert cosine(two.tensors(), other.tensors()) >= 0.98, name

    third = ranked("zero3", optimizer__learning_rate=2e-3, parallelism__ranks=3)
    three = work(small_home, "two-three", third, middle)
    assert min(three.losses) == 11 and three.losses[11] < 1.02 * max(two.losses[10], two.losses[11])


@pytest.mark.slow
@COMPILED
def test_ranks_pause_go_on_and_keep_time_as_one_process_does(trainer: House) -> None:
    override = small(30, checkpoints__every_steps=0, lora__dropout=0.1, limits__max_attempts=1)
    stub = stub_of(trainer)
    job = create(stub, override, "paused", job_id="paused", template="zero3")
    for event in watch(stub, job.name):
        if event.HasField("step") and event.step.step == 3:
            break
    pause(trainer, job.name, "p")
    kept = until(trainer, job.name, pb.JOB_STATE_PAUSED)
    assert 3 <= kept.result.steps < 30 and kept.result.checkpoint_digest
    resume(trainer, job.name, "r")
    events = list(watch(stub, job.name))
    done = get(stub, job.name)
    assert done.state == pb.JOB_STATE_SUCCEEDED, (done.error.message, done.error.log_tail[-1500:])
    calm = create(stub, override, "calm", job_id="calm", template="zero3")
    undisturbed = list(watch(stub, calm.name))
    steps = [[(e.step.step, e.step.loss) for e in found if e.HasField("step")] for found in (events, undisturbed)]
    assert steps[0] == steps[1], "dropout too goes on where it was, on each rank"
    assert done.result.adapter_digest == get(stub, calm.name).result.adapter_digest

    override.train.limits.max_seconds, override.train.schedule.max_steps = 20, 100_000
    late = create(stub, override, "late", job_id="late", template="zero2")
    list(watch(stub, late.name))
    done = get(stub, late.name)
    assert (done.state, done.end) == (pb.JOB_STATE_SUCCEEDED, pb.END_REASON_TIME_LIMIT), done.error
    assert 0 < done.result.steps < 100_000 and done.result.adapter_digest


FORGET = """
import pathlib, sys
import deepspeed, torch
from services.common.worker.load import load_base
from services.trainer.worker import engines, lora, losses, tensors
from services.trainer.worker.zero import Ranked
from qlorad.v1 import trainer_pb2 as pb
from tests.trainer.test_recipe import made_rows

payload, folder, stage, offload = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=f"file://{folder}/meet", rank=0, world_size=1)
spec = pb.TrainSpec()
spec.lora.rank, spec.lora.alpha = 4, 8
spec.lora.target_modules.names.extend(["q_proj", "down_proj"])
spec.optimizer.kind, spec.optimizer.learning_rate = pb.OPTIMIZER_KIND_SGD, 0.1
spec.parallelism.ranks, spec.parallelism.zero_stage, spec.parallelism.offload = 1, stage, offload
rows = made_rows(6, seed=3)
batches = [tensors.packed(rows, part, "cpu") for part in ([0, 1], [2, 3], [4, 5])]

def made(kind):
    torch.manual_seed(1)
    model = lora.with_lora(load_base(payload, "none", False, "fp32"), spec)
    model.train()
    return kind(model, spec, losses.of(model)[0])

def pushed(engine, numbers):
    engine.mine([(n,) for n in numbers])
    for n in numbers:
        engine.backward(engine.loss(batches[n]), 100)

def weights(engine):
    return {n: w.clone() for n, w in engine.weights().items()}

solo, zero = made(engines.Solo), made(Ranked)
for engine in (solo, zero):
    pushed(engine, [0]), engine.step(0.1)
pushed(zero, [1, 2])  # a step that is given up
zero.forget()
for engine in (solo, zero):
    pushed(engine, [0, 1]), engine.step(0.1)
    pushed(engine, [2]), engine.step(0.1)
before = weights(zero)
for name, tensor in solo.weights().items():
    assert float((tensor - before[name]).abs().max()) < 1e-6, name
assert abs(zero.parameter_norm() - solo.parameter_norm()) < 1e-5
zero.mine([(0,)])
zero.backward(zero.loss(batches[0]) * float("nan"), 100)
norm = zero.step(0.1)
assert norm != norm, norm
after = weights(zero)
assert all(torch.equal(before[n], after[n]) for n in before), "a step without a number changes nothing"
for engine in (solo, zero):
    pushed(engine, [1]), engine.step(0.1)
for name, tensor in solo.weights().items():
    assert float((tensor - zero.weights()[name]).abs().max()) < 1e-6, name
print("good")
"""


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize(("stage", "offload"), [(1, 0), (2, 0), (3, 0), (2, pb.OFFLOAD_OPTIMIZER), (3, pb.OFFLOAD_ALL)])
def test_a_step_that_is_given_up_leaves_nothing_behind(
    starter_home: pathlib.Path, tmp_path: pathlib.Path, stage: int, offload: int
) -> None:
    """Given up between its micro-batches, and for a gradient that is no number."""
    payload = Shelf(starter_home / "store").open("models", MODEL.removeprefix("models/")).payload
    environ = {**os.environ, **launch.environ_of(ranked(), EXTENSIONS)}
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), environ["PATH"]])
    argv = [sys.executable, "-c", FORGET, str(payload), str(tmp_path), str(stage), str(offload)]
    ended = subprocess.run(argv, env={**environ, **told}, cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("good\n"), ended.stderr[-3000:]


@pytest.mark.parametrize(("ranks", "threads", "each"), [(1, 4, 4), (2, 4, 2), (2, 1, 1), (3, 8, 2)])
def test_ranks_share_the_threads_of_a_job(ranks: int, threads: int, each: int) -> None:
    train = pb.TrainSpec(threads=threads, parallelism=pb.Parallelism(ranks=ranks))
    environ = launch.environ_of(train, "/somewhere", "cuda:0")
    assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == str(each)
    assert environ.get("DS_ACCELERATOR", "") == ("cuda" if ranks > 1 else "")


@COMPILED
@pytest.mark.slow
def test_a_job_of_two_ranks_is_paused_and_goes_on_in_one(trainer: House) -> None:
    """The way a user has when a card is gone: the steps hold the same rows, the losses stay near."""
    stub, losses = stub_of(trainer), {}
    for name, pauses in (("whole", False), ("shrunk", True)):
        wanted = small(16, lora__dropout=0.0, data__micro_batch_tokens=128, checkpoints__every_steps=4)
        job = create(stub, wanted, name, template="zero2")
        if pauses:
            next(e for e in watch(stub, job.name) if e.HasField("step") and e.step.step >= 6)
            pause(trainer, job.name, "p")
            until(trainer, job.name, pb.JOB_STATE_PAUSED)
            request = pb.ResumeJobRequest(request_id="r", name=job.name, ranks=1)
            train = stub.ResumeJob(request, timeout=20).job.spec.train
            assert (train.parallelism.ranks, train.parallelism.zero_stage, train.data.accumulation) == (1, 0, 2)
        events = list(watch(stub, job.name))
        assert get(stub, job.name).state == pb.JOB_STATE_SUCCEEDED, get(stub, job.name).error
        losses[name] = {e.step.step: (e.step.tokens, e.step.loss) for e in events if e.HasField("step")}
        assert any(e.HasField("resized") for e in events) == pauses
    assert sorted(losses["whole"]) == sorted(losses["shrunk"]) == list(range(1, 17))
    for step, (tokens, loss) in losses["whole"].items():
        other = losses["shrunk"][step]
        assert other[0] == tokens, "a step keeps its rows"
        assert other[1] == pytest.approx(loss, rel=5e-3)
