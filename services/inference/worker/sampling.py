"""Which token comes next.

Law of this room: a request's draws come from its own seed, one a token, and
from nothing else in the batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qlorad.v1 import inference_pb2

_LIKELIEST = 512
"""Tokens that are looked at first when some are left out."""


@dataclass(slots=True)
class Chooser:
    """Chooses for one request. Two equal ones that saw the same choose alike for equal logits."""

    options: inference_pb2.GenerationOptions
    prompt: Sequence[int] = ()
    _draws: random.Random = field(init=False)
    _repetition: float = field(init=False)
    _made: Counter[int] = field(default_factory=Counter)
    _seen: torch.Tensor | None = None
    """Of each token, whether it was in the prompt or made."""

    def __post_init__(self) -> None:
        self._draws = random.Random(self.options.seed)
        self._repetition = self.options.repetition_penalty if self.options.HasField("repetition_penalty") else 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.options.temperature == 0.0 and not self._turns_down

    @property
    def _turns_down(self) -> bool:
        o = self.options
        return self._repetition != 1.0 or o.presence_penalty != 0.0 or o.frequency_penalty != 0.0

    def saw(self, token: int) -> None:
        """Notes a token that was made."""
        if self._turns_down:
            self._made[token] += 1
            if self._seen is not None:
                self._seen[token] = True

    def choose(self, logits: torch.Tensor) -> int:
        """The token for one row of logits [vocabulary]; consumes one draw unless it is greedy."""
        if self._turns_down:
            logits = self._turned_down(logits.clone())
        return int(logits.argmax()) if self.options.temperature == 0.0 else self._draw(logits)

    def _turned_down(self, logits: torch.Tensor) -> torch.Tensor:
        o, made = self.options, self._made
        if self._repetition != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
                self._seen[torch.tensor([*self.prompt, *made], dtype=torch.long, device=logits.device)] = True
            some = logits[self._seen]
            logits[self._seen] = torch.where(some > 0, some / self._repetition, some * self._repetition)
        if made and (o.presence_penalty or o.frequency_penalty):
            which = torch.tensor(list(made), dtype=torch.long, device=logits.device)
            times = torch.tensor(list(made.values()), dtype=logits.dtype, device=logits.device)
            logits[which] -= o.presence_penalty + o.frequency_penalty * times
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        u, o = self._draws.random(), self.options
        scaled = (logits.double() - logits.max()) / o.temperature
        if not o.top_k and o.top_p >= 1.0 and o.min_p <= 0.0:
            return _inverse(torch.softmax(scaled, dim=-1), u)
        # To order a whole vocabulary costs more than a step; what is kept nearly always lies among a few.
        for count in (max(_LIKELIEST, o.top_k), len(scaled)):
            found = self._kept(scaled, min(count, len(scaled)))
            if found is not None:
                chances, tokens = found
                return int(tokens[_inverse(chances, u)])
        raise AssertionError("all of a vocabulary holds all that is kept of it")

    def _kept(self, scaled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What may be drawn and how likely it is, best first; None if it may reach beyond the likeliest `count`."""
        o = self.options
        values, tokens = torch.topk(scaled, count, sorted=False)
        tokens, by_number = torch.sort(tokens)
        values, order = torch.sort(values[by_number], descending=True, stable=True)  # of equals the first
        tokens = tokens[order]
        if o.top_k:
            values, tokens = values[: o.top_k], tokens[: o.top_k]
            chances = torch.softmax(values, dim=-1)
        else:
            chances = torch.exp(values - torch.logsumexp(scaled, dim=-1))
        keep = len(chances)
        if o.min_p > 0.0:
            keep = max(1, int((chances >= o.min_p * chances[0]).sum()))
        if o.top_p < 1.0:
            # Every token whose better ones together stay below top_p; the best always.
            heaped = torch.cumsum(chances, dim=-1)
            keep = min(keep, max(1, int((heaped - chances < o.top_p).sum())))
        if keep == len(chances) == count < len(scaled) and not o.top_k:
            return None
        return chances[:keep], tokens[:keep]


def _inverse(chances: torch.Tensor, u: float) -> int:
    """Where a draw from 0 to 1 falls."""
    heaped = torch.cumsum(chances, dim=-1)
    return min(int(torch.searchsorted(heaped, u * heaped[-1], right=True)), len(heaped) - 1)


def choose(logits: torch.Tensor, choosers: list[Chooser]) -> list[int]:
    """One token a row of logits [rows, vocabulary]."""
    best = logits.argmax(dim=-1).tolist()
    return [
        token if chooser.is_plain else chooser.choose(row)
        for token, chooser, row in zip(best, choosers, logits, strict=True)
    ]


def told(
    logits: torch.Tensor, tokens: Sequence[int], count: int, text: Callable[[int], str]
) -> list[inference_pb2.TokenLogProbability]:
    """How likely each token was in its row of logits [tokens, vocabulary], and the likeliest `count`."""
    sure = torch.log_softmax(logits.double(), dim=-1)
    at = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
    own = sure.gather(-1, at[:, None])[:, 0].tolist()
    best, which = torch.topk(sure, min(count, sure.shape[-1]), dim=-1)
    found = []
    for token, likely, values, ids in zip(tokens, own, best.tolist(), which.tolist(), strict=True):
        one = inference_pb2.TokenLogProbability(id=token, log_probability=likely)
        for ident, value in zip(ids, values, strict=True):
            one.alternatives.add(id=ident, text=text(ident), log_probability=value)
        found.append(one)
    return found
