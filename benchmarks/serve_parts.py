"""The parts of the serving benchmark that are a ratio against a peer.

Law of this room: a side is warmed once with what it is about to do, then sides take turns.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from benchmarks import serve_home, serve_load, talk
from benchmarks.serve_home import IMPORTED, LARGE, MODEL, SEED, Prompt, Prompts, name_of
from benchmarks.serve_house import Served, pin, serving
from services.common.shelf import Shelf

AT_ONCE, PROMPT, NEW = 16, 128, 64
ALONE = 3
"""Requests of a single stream in one turn."""
WARM_NEW = 4
CLOSE = 0.02
"""Largest mean KL to bf16 that counts as the same model."""
SMALL = ("nf4", "int8", "int4")
CORES = sorted(os.sched_getaffinity(0))
THREADS = len(CORES)

Side = Callable[[list[Prompt], int], tuple[int, float, list[list[int]]]]
"""Tokens made, seconds, and the ids of every prompt's answer."""


class Bench:
    """A home, the peer in its process, and what was found."""

    def __init__(self, home: pathlib.Path, rounds: int, quick: bool, others: dict[str, str]) -> None:
        """`others` are the optional peers: "vllm" and "llamacpp", each with a Python that has it."""
        self.others = others
        self.home, self.rounds, self.quick = home, rounds, quick
        self.prompts = Prompts.of(home)
        self.shelf = Shelf(home / "store")
        self.names = [name_of(n) for n in range(IMPORTED)]
        self.results: dict[str, Any] = {}
        self._peer: talk.Child | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._peer is not None:
            self._peer.__exit__(kind, error, at)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Notes how long a part takes."""
        begun = time.perf_counter()
        yield
        self.results.setdefault("part_seconds", {})[part] = round(time.perf_counter() - begun)
        print(f"{part} took {time.perf_counter() - begun:.0f} s", flush=True)

    def peer(self) -> talk.Child:
        """transformers and peft with the first adapters, started when first asked for."""
        if self._peer is None:
            self._peer = talk.Child("benchmarks.serve_peer", str(self.home / MODEL), str(THREADS))
            self.results["peer_adapters"] = self._peer.ask("adapters", folders=self.folders())["dtype"]
        return self._peer

    def folders(self) -> dict[str, str]:
        """Where the first adapters lie."""
        return {name: str(self.shelf.open("adapters", name).payload) for name in self.names}

    @contextlib.contextmanager
    def other(self, name: str) -> Iterator[talk.Child | None]:
        """An optional peer in its own environment, or None where none is given."""
        python = self.others.get(name)
        self.results.setdefault("optional_peers", {})[name] = "ran" if python else "not installed"
        if python is None:
            yield None
            return
        with talk.Child(f"benchmarks.serve_{name}", str(self.home / MODEL), str(THREADS), python=python) as child:
            yield child

    def turns(self, part: str, count: int, sides: dict[str, Side]) -> dict[str, float]:
        """The median rate of each side over the rounds, every side of a round with the same prompts.

        How often the first side's first token is the others' is noted: numbers of a wrong answer are none.
        """
        for side in sides.values():
            side(self.prompts.take(count, PROMPT), WARM_NEW)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        agreed: list[bool] = []
        for number in range(self.rounds):
            prompts, first = self.prompts.take(count, PROMPT), list[list[int]]()
            for name, side in sides.items():
                tokens, seconds, ids = side(prompts, NEW)
                rates[name].append(tokens / seconds)
                agreed += [a[:1] == b[:1] for a, b in zip(first, ids, strict=False)] if name != "tuned" else []
                first = first or ids
            print(part, number, {k: f"{r[-1]:.0f} tok/s" for k, r in rates.items()}, flush=True)
        told = self.results.setdefault("tokens_per_second", {}).setdefault(part, {})
        told |= {name: [round(r, 1) for r in found] for name, found in rates.items()}
        self.results.setdefault("first_token_agreement", {})[part] = round(statistics.fmean(agreed), 3)
        return {name: statistics.median(found) for name, found in rates.items()}

    # Sides.

    def ours(self, served: Served, adapters: list[str]) -> Side:
        """All prompts at once, each with its adapter."""

        def side(prompts: list[Prompt], new: int) -> tuple[int, float, list[list[int]]]:
            found = served.run(serve_load.burst(served.stub, prompts, new, adapters))
            return found.tokens, found.seconds, [s.ids for s in found.seen]

        return side

    def alone(self, served: Served) -> Side:
        """One prompt after another."""

        def side(prompts: list[Prompt], new: int) -> tuple[int, float, list[list[int]]]:
            found = served.run(serve_load.in_turn(served.stub, prompts, new))
            return found.tokens, found.seconds, [s.ids for s in found.seen]

        return side

    def theirs(self, order: str, one_by_one: bool = False, by: talk.Child | None = None, **more: Any) -> Side:
        """An order of the peer, or of an optional one: all prompts in one batch, or one after another."""

        def side(prompts: list[Prompt], new: int) -> tuple[int, float, list[list[int]]]:
            groups = [[p] for p in prompts] if one_by_one else [prompts]
            told = [(by or self.peer()).ask(order, prompts=[p.ids for p in group], new=new, **more) for group in groups]
            ids = [one for t in told for one in t["ids"]]
            return sum(t["tokens"] for t in told), sum(t["seconds"] for t in told), ids

        return side

    # The parts.

    def mixed(self) -> None:
        """Eight adapters, sixteen requests at once."""
        adapters = [self.names[n % len(self.names)] for n in range(AT_ONCE)]
        with serving(self.home, self.names) as served, self.other("vllm") as vllm:
            sides = {
                "ours": self.ours(served, adapters),
                "switching": self.theirs("switching", names=adapters),
                "peft_mixed": self.theirs("mixed", names=adapters),
            }
            if vllm is not None:
                vllm.ask("adapters", folders=self.folders())
                sides["vllm"] = self.theirs("mixed", by=vllm, names=adapters)
            rates = self.turns("mixed", AT_ONCE, sides)
        if "vllm" in rates:
            self.results["serve.mixed8_vs_vllm"] = round(rates["ours"] / rates["vllm"], 3)
        self.results["serve.mixed8_vs_switching"] = round(rates["ours"] / rates["switching"], 3)
        self.results["serve.mixed8_vs_peft_mixed"] = round(rates["ours"] / rates["peft_mixed"], 3)

    def base(self) -> None:
        """Sixteen requests at once of the base alone, and what adapters take of that."""
        adapters = [self.names[n % len(self.names)] for n in range(AT_ONCE)]
        with serving(self.home, self.names) as served:
            sides = {
                "ours": self.ours(served, [serve_load.BASE] * AT_ONCE),
                "hf": self.theirs("base"),
                "tuned": self.ours(served, adapters),
            }
            rates = self.turns("base", AT_ONCE, sides)
        self.results["serve.base16_vs_hf"] = round(rates["ours"] / rates["hf"], 3)
        self.results["serve.lora_tax"] = round(rates["tuned"] / rates["ours"], 3)

    def single(self) -> None:
        """One stream, in bf16 and in every smaller precision that the engine has and that is close to it."""
        held = self._closeness()
        hf = self.theirs("base", one_by_one=True)
        best = 0.0
        with serving(self.home) as served, self.other("llamacpp") as llamacpp:
            rates = self.turns("single bf16", ALONE, {"ours": self.alone(served), "hf": hf})
            self.results["serve.single_vs_hf"] = round(rates["ours"] / rates["hf"], 3)
            for precision, told in held.items():
                if told["refused"] or told["mean_kl"] > CLOSE:
                    continue
                served.unload()
                loaded, _ = served.load(precision)
                sides = {"ours": self.alone(served), "hf": hf}
                if llamacpp is not None:
                    sides["llamacpp"] = self.theirs("base", one_by_one=True, by=llamacpp)
                rates = self.turns(f"single {precision}", ALONE, sides)
                told["vs_hf"] = round(rates["ours"] / rates["hf"], 3)
                told["memory_mb"] = round(loaded.memory_bytes / 1e6)
                if told["vs_hf"] > best:
                    best, self.results["best_precision"] = told["vs_hf"], precision
                    if llamacpp is not None:
                        self.results["serve.single_vs_llamacpp"] = round(rates["ours"] / rates["llamacpp"], 3)
        self.results["serve.single_best_vs_hf"] = best

    def _closeness(self) -> dict[str, dict[str, Any]]:
        """Of each smaller precision how far it is from bf16, or why the engine does not hold it."""
        prompts = [p.ids for p in self.prompts.take(6, PROMPT // 2)]
        held: dict[str, dict[str, Any]] = {}
        with talk.Child("benchmarks.serve_direct", str(self.home)) as direct:
            refused = direct.ask("load", model=MODEL, precision="bf16")["refused"]
            if refused:
                raise SystemExit(f"the engine refuses bf16: {refused}")
            direct.ask("remember", prompts=prompts)
            for precision in SMALL:
                refused = direct.ask("load", model=MODEL, precision=precision)["refused"]
                held[precision] = {"refused": refused}
                if not refused:
                    held[precision] |= direct.ask("divergence", prompts=prompts)
                print("precision", precision, held[precision], flush=True)
        self.results["precisions"] = held
        return held

    def grpc(self) -> None:
        """Through the door against the engine called in its own process: both on one core, all else on another."""
        adapters = [self.names[n % len(self.names)] for n in range(AT_ONCE)]
        new, rounds = 48, max(5, self.rounds)
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        alone = ["taskset", "-c", str(CORES[0])]
        own = talk.Child("benchmarks.serve_direct", str(self.home), environ=one, before=alone)
        with own as direct, serving(self.home, self.names, environ=one) as served:
            try:
                pin(served.engine(), CORES[0])
                pin(served.process(), CORES[-1])
                os.sched_setaffinity(0, {CORES[-1]})
                direct.ask("load", model=MODEL, precision="bf16", threads=1)
                direct.ask("adapters", names=self.names)
                through: list[list[float]] = []
                called: list[list[float]] = []
                for number in range(rounds + 1):
                    prompts = self.prompts.take(AT_ONCE, PROMPT)
                    found = served.run(serve_load.burst(served.stub, prompts, new, adapters))
                    told = direct.ask("burst", texts=[p.text for p in prompts], new=new, names=adapters)
                    if number:  # the first warms
                        through.append(found.steps)
                        called.append(serve_load.steps_of(told["arrivals"], 0.0))
                        print("grpc", number, f"{sum(through[-1]):.2f} s, called {sum(called[-1]):.2f} s", flush=True)
            finally:
                os.sched_setaffinity(0, CORES)
        value, low, high = interval(through, called)
        self.results["serve.grpc_overhead"] = round(high, 4)
        self.results["grpc"] = {
            "ratio": round(value, 4), "interval": [round(low, 4), round(high, 4)], "steps": sum(map(len, through)),
            "seconds": {"grpc": [round(sum(s), 3) for s in through], "called": [round(sum(s), 3) for s in called]},
        }  # fmt: skip

    def adapter(self) -> None:
        """An adapter from the store into memory beside eight others, with every check."""
        serve_home.add_adapters(self.home, 2 * IMPORTED)
        ours, theirs = list[float](), list[float]()
        with serving(self.home, self.names) as served:
            for number in range(self.rounds + 1):
                for other in (name_of(n) for n in range(IMPORTED, 2 * IMPORTED)):
                    took = served.load_adapter(other)
                    served.unload_adapter(other)
                    folder = str(self.shelf.open("adapters", other).payload)
                    told = self.peer().ask("load_adapter", folder=folder)["seconds"]
                    if number:  # the first warms the disk's cache
                        ours.append(took)
                        theirs.append(told)
        self.results["adapter.load_vs_peft"] = round(statistics.median(ours) / statistics.median(theirs), 3)
        size = self.shelf.open("adapters", self.names[0]).size_bytes
        self.results["adapter"] = {
            "bytes": size, "ours_ms": serve_load.spread(ours), "peft_ms": serve_load.spread(theirs),
        }  # fmt: skip

    def model(self) -> None:
        """The second load of an NF4 base, beside a program that quantises anew; imports are in both.

        Beside it stands the same call in a process that has everything imported.
        """
        serve_home.add_large(self.home)
        found: dict[str, Any] = {}
        for name in (MODEL, LARGE):
            ours, fresh, again, kept = list[float](), list[float](), list[float](), list[bool]()
            with serving(self.home, precision="") as served:
                for number in range(min(self.rounds, 3) + 1):
                    told, took = served.load("nf4", name)
                    served.unload(name)
                    theirs = self.peer().ask("load_model", folder=str(self.home / name), fresh=True)["seconds"]
                    warm = self.peer().ask("load_model", folder=str(self.home / name), fresh=False)["seconds"]
                    if number:  # the first is the load before the second
                        ours.append(took)
                        fresh.append(theirs)
                        again.append(warm)
                        kept.append(told.from_prepared)
            middle = {"ours": statistics.median(ours), "fresh": statistics.median(fresh)}
            found[name] = {
                "seconds": {"ours": ours, "theirs": fresh, "theirs_imported": again}, "from_prepared": all(kept),
                "vs_hf": round(middle["ours"] / middle["fresh"], 3),
                "vs_hf_imported": round(middle["ours"] / statistics.median(again), 3),
            }  # fmt: skip
            print("model", name, found[name], flush=True)
        self.results["model.load_vs_hf"] = found[LARGE]["vs_hf"]
        self.results["model_load"] = found


def interval(over: list[list[float]], under: list[list[float]]) -> tuple[float, float, float]:
    """Time of one by that of another, and the ends of a bootstrap interval of 95 %.

    Each list is a run: its first step, which reads the prompts, is drawn among first steps, the others among others.
    """
    draw = random.Random(SEED)

    def whole(runs: list[list[float]]) -> float:
        firsts, others = [r[0] for r in runs], [s for r in runs for s in r[1:]]
        return sum(draw.choices(firsts, k=len(firsts))) + sum(draw.choices(others, k=len(others)))

    found = sorted(whole(over) / whole(under) for _ in range(2000))
    return sum(map(sum, over)) / sum(map(sum, under)), found[49], found[1949]
