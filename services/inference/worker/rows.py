"""A request in the engine: what it still needs, and what it says of what it got.

Law of this room: knows nothing of other rows. An `Answering` reads its prompt and then makes a token a step;
a `Scoring` reads to its end and tells how likely each token was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from qlorad.v1 import inference_pb2
from services.common.frames.v1 import engine_pb2
from services.inference.text import Detokeniser, StopFilter, detokeniser
from services.inference.worker import sampling
from services.inference.worker.flat import Piece
from services.inference.worker.lanes import Place
from services.inference.worker.turns import Share

_CONTEXT_OF_TEXT = 8  # tokens of the prompt that the detokeniser sees
_SCORED_AT_ONCE = 256  # tokens whose logits are held at the same time

Report = engine_pb2.EngineReport
Decode = Callable[[Sequence[int]], str]
Spell = Callable[[int], str]
Reason: TypeAlias = "inference_pb2.FinishReason.ValueType"


@dataclass(slots=True, eq=False)
class Row:
    """What both have."""

    call: int
    adapter: str
    prompt: list[int]
    priority: int
    who: str
    arrived: float = field(default_factory=time.monotonic)
    given: Place | None = None
    is_short: bool = False
    """Whether little of its prompt was left to read when it was admitted."""

    @property
    def share(self) -> Share:
        """Whose turn it takes."""
        return self.who, self.adapter

    @property
    def place(self) -> Place:
        """Where its keys and values are; only of one that was admitted."""
        assert self.given is not None
        return self.given

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not read; of one that was admitted."""
        return max(0, len(self.prompt) - self.place.length)


@dataclass(slots=True, eq=False)
class Answering(Row):
    """Makes tokens."""

    options: inference_pb2.GenerationOptions = field(default_factory=inference_pb2.GenerationOptions)
    decode: Decode = lambda ids: ""
    bytes_of: Callable[[int], bytes] | None = None
    """The bytes of one token, where they depend on no other."""
    spell: Spell = lambda ident: ""
    """The text of one token alone."""
    text: Detokeniser = field(init=False)
    stops: StopFilter = field(init=False)
    chooser: sampling.Chooser = field(init=False)
    end: str = ""
    """Text that ends an answer as its stop strings do; empty = none."""
    made: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = detokeniser(self.decode, self.bytes_of, tuple(self.prompt[-_CONTEXT_OF_TEXT:]))
        self.stops = StopFilter((*self.options.stop, self.end) if self.end else tuple(self.options.stop))
        self.chooser = sampling.Chooser(self.options, self.prompt)

    def longest(self, context: int) -> int:
        """Tokens that it can ever hold keys and values of: the newest token of all is never read."""
        return min(len(self.prompt) + self.options.max_tokens, context) - 1

    def piece(self, tokens: int) -> Piece:
        """Its next tokens, at most so many of the prompt."""
        if self.made:
            return Piece(self.place, self.made[-1:], self.adapter)
        at = self.place.length
        some = self.prompt[at : at + tokens]
        return Piece(self.place, some, self.adapter, 1 if at + len(some) == len(self.prompt) else 0)

    def settle(self, token: int, ends: frozenset[int], context: int) -> tuple[str, Reason]:
        """Takes a token: text that is certain now, and why it ends (0 = it goes on)."""
        self.made.append(token)
        self.chooser.saw(token)
        reason = inference_pb2.FINISH_REASON_UNSPECIFIED
        if token in ends and not self.options.ignore_end:
            piece, stopped = "", False
            reason = inference_pb2.FINISH_REASON_END
        else:
            piece, stopped = self.stops.push(self.text.push(token))
        if stopped:
            return piece, inference_pb2.FINISH_REASON_STOP
        if not reason and (len(self.made) >= self.options.max_tokens or len(self.prompt) + len(self.made) >= context):
            reason = inference_pb2.FINISH_REASON_LENGTH
        if reason:
            rest, stopped = self.stops.push(self.text.flush())
            piece += rest
            if stopped:
                return piece, inference_pb2.FINISH_REASON_STOP
            piece += self.stops.flush()
        return piece, reason


@dataclass(slots=True, eq=False)
class Scoring(Row):
    """Tells how likely its tokens are."""

    counted: Sequence[bool] = ()
    """Whether each token counts."""
    alternatives: int = 0
    spell: Spell = lambda ident: ""
    found: list[inference_pb2.TokenLogProbability] = field(default_factory=list)

    @property
    def unread(self) -> int:
        """Every token but the last foretells another, so the last is not read."""
        return len(self.prompt) - 1 - self.place.length

    def longest(self, context: int) -> int:
        """Tokens that it holds keys and values of."""
        return min(len(self.prompt) - 1, context)

    def piece(self, tokens: int) -> Piece:
        """Its next tokens, at most so many; logits of every one."""
        at = self.place.length
        some = self.prompt[at : min(at + tokens, at + _SCORED_AT_ONCE, len(self.prompt) - 1)]
        return Piece(self.place, some, self.adapter, len(some))

    def take(self, logits: torch.Tensor) -> None:
        """Logits of the tokens of the newest piece."""
        at = len(self.found) + 1
        tokens = self.prompt[at : at + len(logits)]
        self.found += sampling.told(logits, tokens, self.alternatives, self.spell)

    def report(self) -> Report:
        """Everything, once it is read."""
        scored = engine_pb2.EngineScored()
        for number, token in enumerate(self.prompt):
            one = scored.tokens.add(id=token, text=self.spell(token), is_scored=self.counted[number])
            if number:
                one.log_probability = self.found[number - 1].log_probability
                one.alternatives.extend(self.found[number - 1].alternatives)
        return Report(call=self.call, scored=scored)
