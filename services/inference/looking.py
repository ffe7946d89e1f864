"""Questions about texts that generate nothing: how likely, how cut, how rendered.

Law of this room: the engine answers, as it would see the text; one answer to one
question. Whoever leaves takes the work along.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from qlorad.v1 import inference_pb2
from services.common.errors import Violation, invalid
from services.common.frames.v1 import engine_pb2
from services.inference.admission import Admission, Entry
from services.inference.engine import Asked, Report
from services.inference.messages import Ask, check_fit
from services.inference.metrics import Metrics
from services.inference.reach import Held, Reach

_LAST = ("scored", "rendered")


class Looking:
    """Score, Tokenize, Render."""

    def __init__(self, reach: Reach, admission: Admission, metrics: Metrics) -> None:
        self._reach = reach
        self._admission = admission
        self._metrics = metrics

    async def score(self, ask: Ask, alternatives: int) -> inference_pb2.ScoreResponse:
        """How likely a text, or the assistant's turns, are."""
        async with self._held(ask) as (held, entry):
            check_fit(ask, held.context_tokens)
            order = engine_pb2.EngineScore(
                adapter_digest=held.adapter_digest,
                alternatives=alternatives,
                priority=ask.priority,
                who=entry.who,
            )
            _put(order, ask)

            def witness(report: Report) -> None:
                # When it begins, not when it has ended: who leaves has had the work done all the same.
                if report.HasField("accepted"):
                    entry.took(report.accepted.prompt_tokens)
                    self._metrics.prompt_tokens.inc(report.accepted.prompt_tokens)

            report = await _asked(held, order, witness)
        tokens = report.scored.tokens
        counted = [token.log_probability for token in tokens if token.is_scored]
        if not counted:
            what = "prompt" if ask.conversation is None else "conversation"
            raise invalid([Violation(what, f"{len(tokens)} tokens, none to score", "at least two tokens")])
        whole = math.fsum(counted)
        return inference_pb2.ScoreResponse(
            model_digest=held.model_digest,
            adapter_digest=held.adapter_digest,
            tokens=tokens,
            scored_tokens=len(counted),
            log_probability=whole,
            perplexity=_perplexity(whole, len(counted)),
        )

    async def tokenize(self, ask: Ask) -> inference_pb2.TokenizeResponse:
        """The tokens of a raw text."""
        async with self._held(ask) as (held, _):
            report = await _asked(held, _put(engine_pb2.EngineRender(), ask))
        return inference_pb2.TokenizeResponse(tokens=report.rendered.tokens, model_digest=held.model_digest)

    async def render(self, ask: Ask) -> inference_pb2.RenderResponse:
        """A conversation as the model sees it."""
        async with self._held(ask) as (held, _):
            check_fit(ask, held.context_tokens)
            order = engine_pb2.EngineRender(adapter_digest=held.adapter_digest)
            report = await _asked(held, _put(order, ask))
        return inference_pb2.RenderResponse(
            text=report.rendered.text,
            tokens=report.rendered.tokens,
            model_digest=held.model_digest,
            adapter_digest=held.adapter_digest,
        )

    @asynccontextmanager
    async def _held(self, ask: Ask) -> AsyncIterator[tuple[Held, Entry]]:
        with self._admission.enter() as entry:
            async with self._reach.hold(ask) as held:
                yield held, entry


def _put(
    order: engine_pb2.EngineScore | engine_pb2.EngineRender, ask: Ask
) -> engine_pb2.EngineScore | engine_pb2.EngineRender:
    if ask.conversation is not None:
        order.conversation.CopyFrom(ask.conversation)
    else:
        order.prompt = ask.prompt
    return order


async def _asked(held: Held, order: Asked, witness: Callable[[Report], None] = lambda report: None) -> Report:
    """The one answer; cancelled with the caller."""
    call, answers = held.engine.submit(order, witness)
    try:
        while (report := await answers.next()).WhichOneof("report") not in _LAST:
            pass
        return report
    finally:
        held.engine.cancel(call)


def _perplexity(log_probability: float, count: int) -> float:
    try:
        return math.exp(-log_probability / count)
    except OverflowError:
        return math.inf
