"""Training: tokens a second, memory, loss, beside TRL's SFTTrainer; and what the service itself costs.

    python -m benchmarks.train --quick                       # some minutes: fewer steps, no figure of the keys
    python -m benchmarks.train                               # the keys; two hours and more
    python -m benchmarks.train --parts speed,fanout --models 3m --steps 30 --rounds 4

Ours are jobs that are submitted by gRPC; start-up and the first two steps are not counted. Each side's steps
come in turns: ours, theirs, ours, theirs. The worker, and the peer, run with one thread on core 0; daemon and
watchers on core 1. Writes benchmarks/results/train.json and a line in benchmarks/HISTORY.md. Ends with 1 if a
bar is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import daemons, report, train_home
from benchmarks.train_home import HELD_OUT, MODELS, ROOM, SEED, WARM, Ran, child, run_job, spec_of

import grpc  # isort: skip  (train_home sets what it reads)

from qlorad.v1 import trainer_pb2_grpc
from services.common import frames
from services.common.frames.v1 import training_pb2
from services.common.prompt.ledger import LedgerReader
from services.trainer import launch
from services.trainer.worker.batches import Plan

PARTS = ("speed", "overhead", "parity", "memory", "fanout", "growth")
BARS = {
    "train.packed_vs_trl": (2.0, True),
    "train.packed_vs_trl_packed": (1.05, True),
    "train.overhead": (1.05, False),
    "train.peak_memory_vs_trl": (0.9, False),
    "train.loss_parity": (0.02, False),
    "train.memory_use": (0.9, True),
    "train.memory_over": (1.0, False),
    "watch.fanout": (1.05, False),
    "train.growth": (1.0, False),
}
GOALS = {"train.packed_vs_trl": 3.0, "train.packed_vs_trl_packed": 1.5, "train.peak_memory_vs_trl": 0.7}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "grpcio")
WATCHERS = 200
WATCH = """
import asyncio, os, sys
import grpc
from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
async def there(stub, name):
    while True:
        try:
            return await stub.GetJob(trainer_pb2.GetJobRequest(name=name))
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            await asyncio.sleep(0.2)
async def one(channel, name):
    seen, stub = 0, trainer_pb2_grpc.TrainerServiceStub(channel)
    await there(stub, name)
    async for update in stub.WatchJob(trainer_pb2.WatchJobRequest(name=name)):
        seen += update.HasField("event")
    return seen
async def main():
    os.sched_setaffinity(0, {1} if os.cpu_count() > 1 else {0})
    channels = [grpc.aio.insecure_channel(sys.argv[1], [("grpc.use_local_subchannel_pool", 1)]) for _ in range(20)]
    seen = await asyncio.gather(*(one(channels[n % 20], sys.argv[2]) for n in range(int(sys.argv[3]))))
    print(min(seen), max(seen))
asyncio.run(main())
"""
GROW = """
import json, pathlib, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from qlorad.v1 import trainer_pb2
from services.common.worker.load import load_base
from services.trainer.worker import losses
from services.trainer.worker.fast.install import install
from services.trainer.worker.lora import with_lora
torch.set_num_threads(1)
spec = trainer_pb2.TrainSpec.FromString(bytes.fromhex(sys.argv[2]))
model = with_lora(load_base(pathlib.Path(sys.argv[1])), spec)
assert install(model, spec) == ""
model.train()
loss_of, found = losses.of(model)[0], {}
for length in json.loads(sys.argv[3]):
    took = []
    for _ in range(4):
        ids = torch.randint(5, 2000, (1, length))
        begun = time.perf_counter()
        loss_of({"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length)[None]}).backward()
        took.append(time.perf_counter() - begun)
    found[length] = sorted(took[1:])[1]
print(json.dumps(found))
"""


def ratio(over: Ran, under: Ran) -> tuple[float, float, float]:
    """Tokens a second of one by those of another, and the ends of a bootstrap interval of 95 %."""
    draw = random.Random(SEED)

    def rate(ran: Ran) -> float:
        picked = draw.choices(range(len(ran.seconds)), k=len(ran.seconds))
        return sum(ran.tokens[n] for n in picked) / sum(ran.seconds[n] for n in picked)

    found = sorted(rate(over) / rate(under) for _ in range(2000))
    return over.rate / under.rate, found[49], found[1949]


def joined(runs: list[Ran]) -> Ran:
    """Several runs as one."""
    return Ran(
        tuple(t for r in runs for t in r.tokens),
        tuple(s for r in runs for s in r.seconds),
        max(r.peak_bytes for r in runs),
        statistics.fmean(r.loss for r in runs),
    )


class Bench:
    """A home, a trainer, and what was found."""

    def __init__(self, home: pathlib.Path, stub: Any, given: argparse.Namespace) -> None:
        self.home, self.stub, self.given = home, stub, given
        self.results: dict[str, Any] = {}
        self._jobs = 0

    def ours(self, model: str, dataset: str = "speed", steps: int | None = None, **more: Any) -> Ran:
        """A job of ours."""
        self._jobs += 1
        spec = spec_of(model, dataset, (steps or self.steps(model)) + WARM, self.given.checkpointing, **more)
        return run_job(self.home, self.stub, f"run-{self._jobs}", spec)

    def steps(self, model: str) -> int:
        """Steps of one round; the small model's are shorter, and more."""
        return int(self.given.steps * (4 if model == "3m" else 1))

    def theirs(self, model: str, how: str, rows: list[dict[str, Any]], steps: int, **more: Any) -> Ran:
        """TRL on the same rows."""
        order = {
            "model": str(self.home / model), "how": how, "rows": rows, "steps": steps + WARM, "warm": WARM,
            "room": ROOM, "rate": 2e-4, "seed": SEED, "checkpointing": self.given.checkpointing, "held_out": [],
            "folder": str(self.home / "trl"),
        } | more  # fmt: skip
        path = self.home / "order.json"
        path.write_text(json.dumps(order))
        told = json.loads(child("-m", "benchmarks.train_peer", str(path)))
        return Ran(tuple(told["tokens"]), tuple(told["seconds"]), told["peak"] - told["before"], told["loss"])

    def told(self, key: str, model: str, value: float, low: float, high: float, hurts: float) -> None:
        """Notes a figure of a model; the worse model is the figure of the key."""
        self.results.setdefault("models", {}).setdefault(model, {})[key] = {
            "ratio": round(value, 4), "interval": [round(low, 4), round(high, 4)],
        }  # fmt: skip
        worse = min if BARS[key][1] else max
        self.results[key] = round(worse(self.results.get(key, hurts), hurts), 4)
        print(f"{model} {key} {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)

    # The parts.

    def speed(self, model: str) -> None:
        """Tokens a second, and memory, beside TRL padded and packed."""
        steps = self.steps(model)
        runs: dict[str, list[Ran]] = {"ours": [], "packed": [], "padded": []}
        base = train_home.imports_bytes()
        for number in range(self.given.rounds):
            runs["ours"].append(self.ours(model))
            rows = [{"input_ids": ids} for ids, _ in rows_of(train_home.ledger_of(self.home, "speed"), "train")]
            runs["packed"].append(self.theirs(model, "packed", rows, steps))
            runs["padded"].append(self.theirs(model, "padded", rows, max(4, steps // 2)))
            print(model, number, {k: f"{r[-1].rate:.0f} tok/s" for k, r in runs.items()}, flush=True)
        whole = {k: joined(r) for k, r in runs.items()}
        value, low, high = ratio(whole["ours"], whole["padded"])
        self.told("train.packed_vs_trl", model, value, low, high, value)
        value, low, high = ratio(whole["ours"], whole["packed"])
        self.told("train.packed_vs_trl_packed", model, value, low, high, low)
        mine, other = whole["ours"].peak_bytes - base, whole["packed"].peak_bytes
        self.told("train.peak_memory_vs_trl", model, mine / other, mine / other, mine / other, mine / other)
        self.results["models"][model] |= {
            "tokens_per_second": {k: [round(r.rate, 1) for r in rs] for k, rs in runs.items()},
            "peak_mb": {k: round((r.peak_bytes - base * (k == "ours")) / 1e6) for k, r in whole.items()},
            "imports_mb": round(base / 1e6),
            "steps": {k: len(r.seconds) for k, r in whole.items()},
        }

    def overhead(self, model: str) -> None:
        """The service against the same worker run bare: same order, no daemon, nobody who reads."""
        served, bare = [], []
        for _ in range(self.given.rounds):
            served.append(self.ours(model))
            order = training_pb2.Order.FromString(
                (self.home / "state" / "jobs" / f"run-{self._jobs}" / "attempts" / "1" / launch.ORDER).read_bytes()
            )
            folder = self.home / f"bare-{self._jobs}"
            shutil.rmtree(folder, ignore_errors=True)  # of a run before, in a home that is kept
            folder.mkdir()
            (folder / launch.ORDER).write_bytes(order.SerializeToString())
            words = ["taskset", "-c", "0", sys.executable, "-m", launch.SOLO, "--attempt", str(folder)]
            environment = {**os.environ, **launch.environ_of(order.spec, "")}
            with (folder / "log").open("wb") as log:
                subprocess.run(words, check=True, cwd=report.ROOT, env=environment, stdout=log, stderr=log)
            facts, _ = frames.unpack_all((folder / launch.FACTS).read_bytes())
            steps = [f.step for f in map(training_pb2.Fact.FromString, facts) if f.HasField("step")][WARM:]
            bare.append(Ran(tuple(s.tokens for s in steps), tuple(s.step_seconds for s in steps), 0))
        value, low, high = ratio(joined(bare), joined(served))
        self.told("train.overhead", model, value, low, high, high)

    def parity(self, model: str) -> None:
        """Hold-out loss after the same micro-batches in the same order, over three seeds."""
        steps, rate = self.steps(model), 2e-3 if model == "3m" else 2e-4
        pairs = []
        for seed in range(self.given.seeds):
            mine = self.ours(model, "parity", steps - WARM, seed=SEED + seed, optimizer__learning_rate=rate)
            reader = train_home.ledger_of(self.home, "parity")
            rows = list(rows_of(reader, "train"))
            plan = Plan([len(ids) for ids, _ in rows], SEED + seed, True, ROOM, 1, steps, 0)
            batches = [merged([rows[n] for n in one]) for s in plan.steps(steps) for one in s.micro_batches]
            held = [{"input_ids": i, "labels": lab} for i, lab in rows_of(reader, "validation")]
            theirs = self.theirs(model, "ours", batches, steps - WARM, seed=SEED + seed, rate=rate, held_out=held)
            pairs.append((mine.loss, theirs.loss))
            print(model, "hold-out loss, ours and TRL's:", pairs[-1], flush=True)
        mean = [statistics.fmean(one) for one in zip(*pairs, strict=True)]
        off = abs(mean[0] / mean[1] - 1)
        self.told("train.loss_parity", model, off, off, off, off)
        self.results["models"][model]["held_out_loss"] = pairs

    def memory(self, model: str) -> None:
        """How much of a budget an automatic micro-batch fills."""
        budget = {"97m": 1_800_000_000, "3m": 900_000_000}[model]
        ran = self.ours(model, data__micro_batch_tokens=0, memory__budget_bytes=budget, steps=8)
        use = ran.peak_bytes / budget
        self.told("train.memory_use", model, use, use, use, use)
        self.results["train.memory_over"] = round(max(self.results.get("train.memory_over", 0.0), use), 4)
        self.results["models"][model]["micro_batch_tokens"] = ran.chosen

    def fanout(self, model: str) -> None:
        """Step time with 200 watchers by that without."""
        alone, followed = [], []
        address = daemons.address("trainer", self.home)
        for _ in range(self.given.rounds):
            alone.append(self.ours(model))
            ident = f"jobs/run-{self._jobs + 1}"
            words = [sys.executable, "-c", WATCH, address, ident, str(WATCHERS)]
            crowd = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=report.ROOT)
            followed.append(self.ours(model))
            told, _ = crowd.communicate(timeout=120)
            least, most = map(int, told.split())
            if least != most or least < self.steps(model):
                raise SystemExit(f"the watchers saw {least} to {most} events")
        value, low, high = ratio(joined(alone), joined(followed))
        self.told("watch.fanout", model, value, low, high, high)

    def growth(self, model: str) -> None:
        """Cost of one row against its length: the exponent from the shortest to the longest."""
        if model != "97m":
            return
        lengths = [64, 128, 256, 512, 1024, 2048, 4096]
        order = spec_of(model, "speed", 1, False).train
        order.lora.target_modules.names.extend(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        found = json.loads(
            child("-c", GROW, str(self.home / model), order.SerializeToString().hex(), json.dumps(lengths))
        )
        seconds = {int(k): v for k, v in found.items()}
        slope = math.log(seconds[4096] / seconds[64]) / math.log(64)
        self.told("train.growth", model, slope, slope, slope, slope)
        self.results["growth"] = {
            "seconds": {k: round(v, 4) for k, v in seconds.items()},
            "steepest": round(max(math.log2(seconds[2 * n] / seconds[n]) for n in lengths[:-1]), 3),
        }


def rows_of(reader: LedgerReader, split: str) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of a split's rows."""
    rows = reader.split(split)
    for number in range(len(rows)):
        ids, mask = rows.ids(number).tolist(), rows.mask(number).tolist()
        yield ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def merged(rows: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Several rows as TRL takes a packed one."""
    return {
        "input_ids": [i for ids, _ in rows for i in ids],
        "labels": [i for _, labels in rows for i in [-100, *labels[1:]]],
        "seq_lengths": [len(ids) for ids, _ in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: a look, not the figures of the keys")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="of one round with the large model; the small one does four times")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--checkpointing", action="store_true", help="on both sides, as is TRL's default")
    parser.add_argument("--home", type=pathlib.Path, help="keeps models and rows here for the next run")
    given = parser.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 10)
    given.steps = given.steps or (6 if given.quick else 20)
    given.seeds = given.seeds or (1 if given.quick else 3)
    train_home.settle()
    with tempfile.TemporaryDirectory() as folder:
        home = given.home or pathlib.Path(folder) / "home"
        if not (home / "3m").exists():
            train_home.make_home(home)
        shutil.rmtree(home / "state", ignore_errors=True)
        with daemons.running("trainer", home), grpc.insecure_channel(daemons.address("trainer", home)) as channel:
            bench = Bench(home, trainer_pb2_grpc.TrainerServiceStub(channel), given)
            for part in given.parts.split(","):
                measure: Callable[[str], None] = getattr(bench, part)
                for model in given.models.split(","):
                    measure(model)
    finish(bench.results, given)


def finish(results: dict[str, Any], given: argparse.Namespace) -> None:
    """Writes what was found, and ends with 1 where a bar is not met."""
    judged = {key: bar for key, bar in BARS.items() if key in results}
    name = "train-checkpointing" if given.checkpointing else "train"
    whole = not given.quick and set(given.parts.split(",")) == set(PARTS)
    results["bars"] = {k: {"bar": bar, "goal": GOALS.get(k)} for k, (bar, _) in judged.items()}
    results["conditions"] = report.conditions(
        PACKAGES, rounds=given.rounds, steps=given.steps, models=given.models, parts=given.parts, seeds=[SEED],
        checkpointing=given.checkpointing, whole=whole, threads=1, micro_batch_tokens=ROOM, held_out=HELD_OUT,
    )  # fmt: skip
    figures = ", ".join(f"{key.partition('.')[2]} {results[key]}" for key in judged)
    part = "quick" if given.quick else "-".join(given.parts.split(","))
    report.write(name if whole else f"{name}-{part}", results, figures + ("" if whole else " (in part)"))
    report.judge(results, judged)


if __name__ == "__main__":
    main()
