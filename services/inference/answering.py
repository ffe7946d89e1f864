"""One request from the door to its finish.

Law of this room: a stream is one Started, deltas, one Finish, or it ends with a
Fault. Whoever leaves takes the work along. Every queue is bounded: what is too
much is refused at once with a hint when to come again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from qlorad.v1 import errors_pb2, inference_pb2
from services.common.errors import Fault, invalid
from services.common.frames.v1 import engine_pb2
from services.inference.engine import Answers
from services.inference.messages import Ask, check_options
from services.inference.metrics import Metrics
from services.inference.residency import Hold, Residency

Event = inference_pb2.Started | inference_pb2.Delta | inference_pb2.Finish


@dataclass(slots=True)
class Clock:
    """When things happened to one request, and what of it the metrics see."""

    metrics: Metrics
    arrived: float
    waited: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def witness(self, report: engine_pb2.EngineReport) -> None:
        """Sees each report when it comes from the engine, however slow the caller reads."""
        now = time.monotonic()
        if report.HasField("begun"):
            self.waited = report.begun.waited_seconds
        elif report.HasField("tokens"):
            self.metrics.generated_tokens.inc(len(report.tokens.ids))
            if self.first:
                self.metrics.between_tokens.observe(now - self.last)
            else:
                self.first = now
                self.metrics.first_token.observe(now - self.arrived)
            self.last = now


class Answering:
    """The streaming calls of InferenceService."""

    def __init__(self, residency: Residency, metrics: Metrics, limit: int) -> None:
        self._residency = residency
        self._metrics = metrics
        self._limit = limit
        self._asks = 0
        self._open: set[Answers] = set()

    def context_tokens(self) -> int:
        """The longest context of what is, or would be, resident; 0 = nothing is wanted."""
        return max((base.context_tokens for base in self._residency.memory.now.bases), default=0)

    def end_all(self) -> None:
        """Ends what is still open when the daemon must go."""
        for answers in list(self._open):
            answers.fail(Fault(errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down", retry_seconds=2.0))

    async def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Started, deltas, Finish."""
        clock = Clock(self._metrics, time.monotonic())
        if self._asks >= self._limit:
            raise Fault(
                errors_pb2.REASON_QUEUE_FULL,
                f"{self._asks} requests are in flight or wait; accepted: at most {self._limit}",
                retry_seconds=1.0,
            )
        self._asks += 1
        try:
            hold = await self._residency.who(ask.model, ask.adapter)
            try:
                if wrong := check_options(ask.options, hold.context_tokens):
                    raise invalid(wrong)
                call, answers = hold.engine.submit(_submit(ask, hold.adapter_digest), clock.witness)
                self._open.add(answers)
                try:
                    async for event in self._events(ask, hold, answers, clock):
                        yield event
                finally:
                    self._open.discard(answers)
                    hold.engine.cancel(call)
            finally:
                hold.release()
        finally:
            self._asks -= 1

    async def _events(self, ask: Ask, hold: Hold, answers: Answers, clock: Clock) -> AsyncGenerator[Event, None]:
        prompt_tokens = made = 0
        while True:
            report = await answers.next()
            if report.HasField("accepted"):
                prompt_tokens = report.accepted.prompt_tokens
                self._metrics.prompt_tokens.inc(prompt_tokens)
                yield inference_pb2.Started(
                    model_digest=hold.model_digest,
                    adapter_digest=hold.adapter_digest,
                    prompt_tokens=prompt_tokens,
                    seed=ask.options.seed,
                    request_id=ask.request_id,
                )
            elif report.HasField("tokens"):
                made += len(report.tokens.ids)
                yield inference_pb2.Delta(text=report.tokens.text, ids=report.tokens.ids)
            elif report.HasField("ended"):
                reason = report.ended.reason
                self._metrics.finished.labels(_short(reason)).inc()
                yield inference_pb2.Finish(
                    reason=reason,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=made,
                    first_token_seconds=clock.first - clock.arrived,
                    total_seconds=time.monotonic() - clock.arrived,
                    queue_seconds=clock.waited,
                )
                return


def _submit(ask: Ask, digest: str) -> engine_pb2.EngineSubmit:
    submit = engine_pb2.EngineSubmit(adapter_digest=digest, options=ask.options)
    if ask.conversation is not None:
        submit.conversation.CopyFrom(ask.conversation)
    else:
        submit.prompt = ask.prompt
    return submit


def _short(reason: inference_pb2.FinishReason.ValueType) -> str:
    return inference_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
