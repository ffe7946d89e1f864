"""Which token comes next.

Law of this room: a request's draws come from its own seed, one a token, and
from nothing else in the batch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from qlorad.v1 import inference_pb2


@dataclass(slots=True)
class Chooser:
    """Chooses for one request. Two equal ones choose alike for equal logits."""

    options: inference_pb2.GenerationOptions
    _draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._draws = random.Random(self.options.seed)

    @property
    def is_greedy(self) -> bool:
        return self.options.temperature == 0.0

    def draw(self, logits: torch.Tensor) -> int:
        """The token for one row of logits [vocabulary]; consumes one draw."""
        u = self._draws.random()
        ordered, tokens = torch.sort(logits.double() / self.options.temperature, descending=True, stable=True)
        if self.options.top_k:
            ordered, tokens = ordered[: self.options.top_k], tokens[: self.options.top_k]
        chances = torch.softmax(ordered, dim=-1)
        heaped = torch.cumsum(chances, dim=-1)
        if self.options.top_p < 1.0:
            # Every token whose better ones together stay below top_p; the best always.
            keep = max(1, int((heaped - chances < self.options.top_p).sum()))
            heaped = heaped[:keep]
        at = int(torch.searchsorted(heaped, u * heaped[-1], right=True))
        return int(tokens[min(at, len(heaped) - 1)])


def choose(logits: torch.Tensor, choosers: list[Chooser]) -> list[int]:
    """One token a row of logits [rows, vocabulary]."""
    best = logits.argmax(dim=-1).tolist()
    return [
        token if chooser.is_greedy else chooser.draw(row)
        for token, chooser, row in zip(best, choosers, logits, strict=True)
    ]
