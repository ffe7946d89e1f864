"""The engine called in its own process: no daemon, no socket, no gRPC. And what its precisions change.

    python -m benchmarks.serve_direct FD HOME

Obeys the orders below. The only file of the benchmark that knows the inside of services/inference/worker.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
import time
from typing import Any

import torch

from benchmarks import talk
from qlorad.v1 import inference_pb2
from services.common.errors import Fault
from services.common.frames.v1 import engine_pb2
from services.common.shelf import Shelf
from services.inference.worker import base as worker
from services.inference.worker import flat

Answer = dict[str, Any]
SHARPER = 4.0
"""Random weights give flat logits, which flatter a divergence; times four they spread like a trained model's."""


class Direct:
    """At most one base at a time, by the worker's own way of loading."""

    def __init__(self, home: pathlib.Path) -> None:
        self._shelf = Shelf(home / "store")
        self._numbers = itertools.count(1)
        self._base: Any = None
        self._digests: dict[str, str] = {}
        self._kept = torch.empty(0)

    def load(self, model: str, precision: str, max_rows: int = 16, threads: int = 0) -> Answer:
        """Brings a base into memory, alone; `refused` tells why it cannot be held so."""
        if threads:
            torch.set_num_threads(threads)
        self._base, self._digests = None, {}
        sealed = self._shelf.open("models", model)
        load = engine_pb2.EngineLoad(
            name=f"models/{model}", payload=str(sealed.payload), manifest=sealed.manifest, device="cpu",
            precision=inference_pb2.Precision.Value(f"PRECISION_{precision.upper()}"), max_rows=max_rows,
            threads=threads,
        )  # fmt: skip
        try:
            self._base = worker.bring(load)
        except Fault as fault:
            return {"refused": fault.message}
        return {"refused": "", "memory_bytes": self._base.told(0.0).memory_bytes}

    def adapters(self, names: list[str]) -> Answer:
        """Takes adapters in, with every check."""
        for name in names:
            sealed = self._shelf.open("adapters", name, verify=True)
            order = engine_pb2.EngineLoadAdapter(
                name=f"adapters/{name}", payload=str(sealed.payload), manifest=sealed.manifest
            )
            self._base.add(next(self._numbers), self._base.prepare(order))
            self._digests[name] = sealed.digest
        return {}

    def burst(self, texts: list[str], new: int, names: list[str]) -> Answer:
        """All at once; arrivals of every row's tokens, in seconds from the first submit."""
        options = inference_pb2.GenerationOptions(
            max_tokens=new, temperature=0.0, top_p=1.0, top_k=0, seed=0, min_p=0.0, repetition_penalty=1.0,
            presence_penalty=0.0, frequency_penalty=0.0, ignore_end=True,
        )  # fmt: skip
        arrivals: dict[int, list[float]] = {}
        begun = time.perf_counter()
        for text, name in zip(texts, names, strict=True):
            call = next(self._numbers)
            arrivals[call] = []
            digest = self._digests.get(name, "")
            submit = engine_pb2.EngineSubmit(adapter_digest=digest, prompt=text, options=options)
            self._base.submit(call, submit, self._base.reader.prompt(submit))
        while self._base.scheduler.has_work:
            reports = self._base.scheduler.step()
            now = time.perf_counter() - begun
            for report in reports:
                if report.HasField("tokens"):
                    arrivals[report.call] += [now] * len(report.tokens.ids)
        return {"arrivals": list(arrivals.values()), "seconds": time.perf_counter() - begun}

    def remember(self, prompts: list[list[int]]) -> Answer:
        """Keeps what this base says after every token of some prompts, for `divergence`."""
        self._kept = self._logits(prompts)
        return {}

    def divergence(self, prompts: list[list[int]]) -> Answer:
        """Mean KL of what was kept to what this base says: of tokens read in one piece, of tokens one by one, and
        the worse of both; that again with logits made sharper; how often the likeliest token is the same."""
        kept, mine = self._kept, self._logits(prompts)

        def mean(times: float, part: int) -> float:
            true, own = (torch.log_softmax(times * x[:, part], dim=-1) for x in (kept, mine))
            return float((true.exp() * (true - own)).sum(-1).mean())

        read, written = mean(1.0, 0), mean(1.0, 1)
        return {
            "mean_kl": max(read, written), "mean_kl_read": read, "mean_kl_one_by_one": written,
            "mean_kl_sharper": max(mean(SHARPER, 0), mean(SHARPER, 1)),
            "same_best": float((kept.argmax(-1) == mine.argmax(-1)).float().mean()),
        }  # fmt: skip

    def _logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits [prompts, 2, tokens, vocabulary] as requests get them: the first half of a prompt is read in one
        piece, the second token by token, which may go another way."""
        half = len(prompts[0]) // 2
        return torch.stack([torch.stack(self._said(ids, half)) for ids in prompts])

    def _said(self, ids: list[int], half: int) -> list[torch.Tensor]:
        forward, lanes = self._base.scheduler._forward, self._base.scheduler._lanes
        place, device = lanes.take(len(ids)), self._base.scheduler._device
        found = []
        for begin, end in [(0, half), *((n, n + 1) for n in range(half, 2 * half))]:
            pieces = [flat.Piece(place, ids[begin:end], "", end - begin)]
            found.append(forward(flat.lay(pieces, device)).clone())
            flat.settle(pieces)
        lanes.give(place)
        return [found[0], torch.cat(found[1:])]


def main() -> None:
    direct = Direct(pathlib.Path(sys.argv[2]))
    orders = (direct.load, direct.adapters, direct.burst, direct.remember, direct.divergence)
    talk.obey({order.__name__: order for order in orders}, int(sys.argv[1]))


if __name__ == "__main__":
    main()
