"""What the training benchmark works on: models, rows, and jobs as they are seen from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from typing import Any

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import numpy as np
import tokenizers

from benchmarks import daemons, report
from qlorad.v1 import artifacts_pb2, datasets_pb2, registry_pb2, registry_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from services.common import facts, shards
from services.common.prompt import example
from services.common.prompt.ledger import LedgerReader
from services.common.shelf import Shelf

SEED, ROWS, HELD_OUT, ROOM, LONGEST, WARM = 20261121, 256, 48, 1024, 512, 2
MODELS = {
    "97m": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
        "intermediate_size": 2048, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
    "3m": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 768, "vocab_size": 2048, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""Random weights, the sizes of BENCHMARKS.md; "3m" has those of the demo starter."""
MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]), bos_token_id=None, eos_token_id=2, pad_token_id=0)).to(
    torch.bfloat16
).save_pretrained(sys.argv[1])
"""
EMPTY = """
import bitsandbytes
from services.trainer.worker import recipe
print(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """Steps of a run, without the first ones, and its largest memory."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_bytes: int
    loss: float = 0.0
    """On held-out rows, at the end."""
    chosen: int = 0
    """Tokens of a micro-batch."""

    @property
    def rate(self) -> float:
        return sum(self.tokens) / sum(self.seconds)


def make_home(home: pathlib.Path) -> None:
    """Models, and datasets/speed and datasets/parity: the same rows, the second with some held out."""
    import json

    home.mkdir(parents=True, exist_ok=True)
    with daemons.running("registry", home), grpc.insecure_channel(daemons.address("registry", home)) as channel:
        stub = registry_pb2_grpc.ModelServiceStub(channel)
        size = registry_pb2.STARTER_SIZE_TEST
        list(stub.MakeStarterModel(registry_pb2.MakeStarterModelRequest(request_id="s", size=size)))
        starter = Shelf(home / "store").open("models", "starter-test").payload
        for name, config in MODELS.items():
            folder = home / name
            subprocess.run([sys.executable, "-W", "ignore", "-c", MAKE, str(folder), json.dumps(config)], check=True)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(starter / file, folder / file)
            asked = registry_pb2.ImportModelRequest(request_id=name, path=str(folder), model_id=name)
            model = list(stub.ImportModel(asked))[-1].model
            if model.state != registry_pb2.MODEL_STATE_READY:
                raise SystemExit(f"{name} was not imported: {model}")
    tokenizer = tokenizers.Tokenizer.from_file(str(starter / "tokenizer.json"))
    made = texts(tokenizer, ROWS + HELD_OUT)
    shelf = Shelf(home / "store")
    for alias, splits in (
        ("speed", {"train": made[:ROWS]}),
        ("parity", {"train": made[:ROWS], "validation": made[ROWS:]}),
    ):
        staged = shelf.stage()
        for split, rows in splits.items():
            with shards.ShardWriter(staged.payload, split) as writer:
                for number, text in enumerate(rows):
                    origin = datasets_pb2.Origin(file="made.jsonl", line=number + 1)
                    body = datasets_pb2.Completion(completion=text)
                    writer.add(example.dumps(datasets_pb2.Example(completion=body, origin=origin)))
        (staged.payload / "findings.jsonl").write_bytes(b"")
        sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_DATASET, {"made": "for a bench"})
        shelf.set_alias("datasets", alias, sealed.digest)


def texts(tokenizer: tokenizers.Tokenizer, count: int) -> list[str]:
    """Pieces of the standard library, of log-normal lengths from 20 to 400 tokens."""
    draw = np.random.default_rng(SEED)
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    whole = "".join(p.read_text(encoding="utf-8", errors="ignore") for p in sorted(library.glob("*.py"))[:60])
    ids = tokenizer.encode(whole, add_special_tokens=False).ids
    made, at = [], 0
    for length in np.clip(draw.lognormal(np.log(100), 0.7, count), 20, 400).astype(int).tolist():
        made.append(tokenizer.decode(ids[at : at + length]))
        at += length
    return made


def ledger_of(home: pathlib.Path, dataset: str) -> LedgerReader:
    """The rows as a job read them."""
    shelf = Shelf(home / "store")
    digest = shelf.open("datasets", dataset).digest
    for sealed in shelf.every(artifacts_pb2.ARTIFACT_KIND_LEDGER):
        if facts.from_manifest(facts.LedgerFacts, sealed.manifest).dataset_digest == digest:
            return LedgerReader.open(sealed)
    raise SystemExit(f"no ledger of {dataset}")


def spec_of(model: str, dataset: str, steps: int, checkpointing: bool, **more: Any) -> trainer_pb2.JobSpec:
    """The one configuration of ours that every key is measured with."""
    train = trainer_pb2.TrainSpec(model=f"models/{model}", dataset=f"datasets/{dataset}", threads=1, seed=SEED)
    train.lora.rank, train.lora.alpha = 16, 32
    train.data.max_length_tokens, train.data.micro_batch_tokens, train.data.accumulation = LONGEST, ROOM, 1
    train.optimizer.learning_rate = 2e-4
    train.schedule.kind, train.schedule.max_steps = trainer_pb2.SCHEDULE_KIND_CONSTANT, steps
    train.checkpoints.every_steps = 1000
    train.memory.gradient_checkpointing = checkpointing
    for name, value in more.items():
        group, _, field = name.rpartition("__")
        setattr(getattr(train, group) if group else train, field, value)
    return trainer_pb2.JobSpec(train=train)


def run_job(
    home: pathlib.Path, stub: trainer_pb2_grpc.TrainerServiceStub, ident: str, spec: trainer_pb2.JobSpec
) -> Ran:
    """A job through the service, its worker on core 0; start-up is not in the steps that are told."""
    request = trainer_pb2.CreateJobRequest(request_id=ident, job_id=ident, template="all-linear", spec=spec)
    job = stub.CreateJob(request, timeout=60).job
    worker = home / "state" / "jobs" / ident / "attempts" / "1"
    with watched(str(worker)) as seen:
        steps, loss, chosen = [], 0.0, 0
        for update in stub.WatchJob(trainer_pb2.WatchJobRequest(name=job.name), timeout=3600):
            event = update.event
            if event.HasField("step"):
                steps.append((event.step.tokens, event.step.step_seconds))
            elif event.HasField("evaluated"):
                loss = event.evaluated.loss
            elif event.HasField("planned"):
                chosen = event.planned.chosen.micro_batch_tokens
    ended = stub.GetJob(trainer_pb2.GetJobRequest(name=job.name)).job
    if ended.state != trainer_pb2.JOB_STATE_SUCCEEDED:
        raise SystemExit(f"{ident} ended badly: {ended.error}")
    tokens, seconds = zip(*steps[WARM:], strict=True)
    return Ran(tokens, seconds, seen.peak, loss, chosen)


class Seen:
    """The largest resident memory of a process."""

    peak = 0


@contextlib.contextmanager
def watched(word: str) -> Iterator[Seen]:
    """Looks at the process whose command holds a word: its peak, and that it stays on core 0."""
    seen, over = Seen(), threading.Event()

    def look() -> None:
        found: pathlib.Path | None = None
        while not over.wait(0.02):
            if found is None:
                found = next((p for p in pathlib.Path("/proc").glob("[0-9]*") if word in _command(p)), None)
                continue
            try:
                for thread in (found / "task").iterdir():
                    os.sched_setaffinity(int(thread.name), {0})
                lines = (found / "status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            peak = next((line for line in lines if line.startswith("VmHWM")), "VmHWM 0")
            seen.peak = max(seen.peak, 1024 * int(peak.split()[1]))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _command(process: pathlib.Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def child(*words: str, timeout: float = 3600) -> str:
    """What a program told on its last line; on core 0, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, *words], capture_output=True, text=True, env=environment,
        cwd=report.ROOT, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{words[:3]} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def imports_bytes() -> int:
    """Resident memory of a worker that has imported what it needs and done nothing."""
    return 1024 * int(child("-W", "ignore", "-c", EMPTY))


def settle() -> None:
    """This process and its threads to core 1, where there is one."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {1})
