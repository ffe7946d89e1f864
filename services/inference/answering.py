"""One request, or several at once, from the door to the finish.

Law of this room: a stream is one Started, deltas, one Finish, or it ends with a
Fault; of several, each ends so, and a Fault of one is its failure alone. Whoever
leaves takes the work along. Every queue is bounded: what is too much is refused
at once with a hint when to come again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from qlorad.v1 import errors_pb2, inference_pb2
from services.common import generation
from services.common.errors import Fault
from services.common.frames.v1 import engine_pb2
from services.inference.admission import Admission, Entry
from services.inference.engine import Answers
from services.inference.generation_cache import GenerationCache, Kept, Recorder, key_of
from services.inference.messages import Ask, check_fit
from services.inference.metrics import Metrics
from services.inference.reach import Held, Reach

Event = inference_pb2.Started | inference_pb2.Delta | inference_pb2.Finish
Told = tuple[int, Event | inference_pb2.Failure]

_SEED_BITS = 64


@dataclass(slots=True)
class Clock:
    """When things happened to one request, and what of it the metrics see."""

    metrics: Metrics
    took: Callable[[int], None]
    """Told of every token, for the key's account."""
    arrived: float
    waited: float = 0.0
    cached: int = 0
    first: float = 0.0
    last: float = 0.0

    def witness(self, report: engine_pb2.EngineReport) -> None:
        """Sees each report when it comes from the engine, however slow the caller reads."""
        now = time.monotonic()
        if report.HasField("accepted"):
            self.metrics.prompt_tokens.inc(report.accepted.prompt_tokens)
            self.took(report.accepted.prompt_tokens)
        elif report.HasField("begun"):
            self.waited, self.cached = report.begun.waited_seconds, report.begun.cached_tokens
            self.metrics.queue_wait.observe(self.waited)
        elif report.HasField("tokens"):
            self.metrics.generated_tokens.inc(len(report.tokens.ids))
            self.took(len(report.tokens.ids))
            if self.first:
                self.metrics.between_tokens.observe(now - self.last)
            else:
                self.first = now
                self.metrics.first_token.observe(now - self.arrived)
            self.last = now


class Answering:
    """The streaming calls of InferenceService."""

    def __init__(self, reach: Reach, admission: Admission, cache: GenerationCache, metrics: Metrics) -> None:
        self._reach = reach
        self._admission = admission
        self._cache = cache
        self._metrics = metrics
        self._open: set[Answers] = set()
        self._ending = False

    def context_tokens(self) -> int:
        """What requests are held against at the door; 0 = not known yet."""
        return self._reach.context_tokens()

    def highest_priority(self) -> int:
        """The highest that who calls may ask for."""
        return self._admission.highest_priority()

    def end_all(self) -> None:
        """Ends what is still open, and what would begin, when the daemon must go."""
        self._ending = True
        for answers in list(self._open):
            answers.fail(_shutting_down())

    async def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Started, deltas, Finish."""
        with self._admission.enter() as entry:
            async with aclosing(self._one(ask, entry)) as events:
                async for event in events:
                    yield event

    async def several(self, asks: Sequence[Ask]) -> AsyncGenerator[Told, None]:
        """Events of all as they come, each with its number; each ends with a Finish or a Failure of its own."""
        with self._admission.enter(len(asks)) as entry:
            told: asyncio.Queue[Told | BaseException] = asyncio.Queue(2 * entry.width)
            rest = iter(enumerate(asks))
            tasks = [asyncio.create_task(self._work(rest, entry, told, n == 0)) for n in range(entry.width)]
            try:
                left = len(asks)
                while left:
                    news = await told.get()
                    if isinstance(news, BaseException):
                        raise news
                    yield news
                    left -= isinstance(news[1], inference_pb2.Finish | inference_pb2.Failure)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(
        self, rest: Iterator[tuple[int, Ask]], entry: Entry, told: asyncio.Queue[Told | BaseException], first: bool
    ) -> None:
        """Answers one after another, each in a place of its own; the first has the call's.

        A prompt is taken up only once there is a place for it: so the call's own
        place is enough to answer them all, and calls never wait for one another.
        """
        places = self._admission.places
        try:
            while True:
                if not first:
                    await places.wait(entry.who)
                try:
                    following = next(rest, None)
                    if following is None:
                        return
                    await self._tell(*following, entry, told)
                finally:
                    if not first:
                        places.free(entry.who)
        except Exception as error:  # not swallowed: the reader of the queue raises it
            await told.put(error)

    async def _tell(self, index: int, ask: Ask, entry: Entry, told: asyncio.Queue[Told | BaseException]) -> None:
        """One of several; its Fault is its own."""
        try:
            with self._metrics.refused():
                async with aclosing(self._one(ask, entry)) as events:
                    async for event in events:
                        await told.put((index, event))
        except Fault as fault:
            failure = inference_pb2.Failure(
                reason=fault.reason, message=fault.message, retry_seconds=fault.retry_seconds
            )
            await told.put((index, failure))

    async def _one(self, ask: Ask, entry: Entry) -> AsyncGenerator[Event, None]:
        clock = Clock(self._metrics, entry.took, time.monotonic())
        if self._ending:
            raise _shutting_down()
        async with self._reach.hold(ask) as held:
            submit = submit_of(ask, held, entry.who)
            key = key_of(submit, held.model_digest, held.precision) if self._cache.on else None
            kept = self._cache.get(key)
            if key is not None:
                self._metrics.generation_cache.labels("hit" if kept is not None else "miss").inc()
            if kept is not None:
                for event in self._again(kept, ask, submit, held, clock):
                    yield event
                return
            call, answers = held.engine.submit(submit, clock.witness)
            self._open.add(answers)
            try:
                async with aclosing(self._events(ask, submit, held, answers, clock, key)) as events:
                    async for event in events:
                        yield event
            finally:
                self._open.discard(answers)
                held.engine.cancel(call)

    async def _events(
        self,
        ask: Ask,
        submit: engine_pb2.EngineSubmit,
        held: Held,
        answers: Answers,
        clock: Clock,
        key: bytes | None,
    ) -> AsyncGenerator[Event, None]:
        prompt_tokens = made = 0
        recorder = Recorder()
        while True:
            report = await answers.next()
            if report.HasField("accepted"):
                prompt_tokens = report.accepted.prompt_tokens
                yield _started(ask, submit, held, prompt_tokens)
            elif report.HasField("tokens"):
                tokens = report.tokens
                made += len(tokens.ids)
                if key is not None:
                    recorder.add(tokens.text, tokens.ids)
                yield inference_pb2.Delta(text=tokens.text, ids=tokens.ids, log_probabilities=tokens.log_probabilities)
            elif report.HasField("ended"):
                reason = report.ended.reason
                self._metrics.finished.labels(_short(reason)).inc()
                if reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                    self._cache.put(key, recorder.whole(prompt_tokens, reason))
                yield inference_pb2.Finish(
                    reason=reason,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=made,
                    first_token_seconds=clock.first - clock.arrived,
                    total_seconds=time.monotonic() - clock.arrived,
                    queue_seconds=clock.waited,
                    cached_prompt_tokens=clock.cached,
                )
                return

    def _again(
        self, kept: Kept, ask: Ask, submit: engine_pb2.EngineSubmit, held: Held, clock: Clock
    ) -> Iterator[Event]:
        """An answer that was at hand. Its tokens were not made, and are not counted as made."""
        self._metrics.finished.labels(_short(kept.reason)).inc()
        yield _started(ask, submit, held, kept.prompt_tokens)
        yield inference_pb2.Delta(text=kept.text, ids=kept.ids)
        seconds = time.monotonic() - clock.arrived
        yield inference_pb2.Finish(
            reason=kept.reason,
            prompt_tokens=kept.prompt_tokens,
            completion_tokens=len(kept.ids),
            first_token_seconds=seconds,
            total_seconds=seconds,
            from_cache=True,
        )


def submit_of(ask: Ask, held: Held, who: str) -> engine_pb2.EngineSubmit:
    """The request in full: its own options, its preset's, its adapter's, the house's."""
    context = held.context_tokens
    check_fit(ask, context)
    house = generation.house(secrets.randbits(_SEED_BITS))
    inherited = (generation.within(said, context) for said in (ask.inherited, held.defaults, house))
    options = generation.resolved(ask.options, *inherited)
    submit = engine_pb2.EngineSubmit(
        adapter_digest=held.adapter_digest,
        options=options,
        priority=ask.priority,
        who=who,
    )
    if ask.conversation is not None:
        submit.conversation.CopyFrom(ask.conversation)
    else:
        submit.prompt = ask.prompt
    return submit


def _started(ask: Ask, submit: engine_pb2.EngineSubmit, held: Held, prompt_tokens: int) -> inference_pb2.Started:
    return inference_pb2.Started(
        model_digest=held.model_digest,
        adapter_digest=held.adapter_digest,
        prompt_tokens=prompt_tokens,
        seed=submit.options.seed,
        request_id=ask.request_id,
    )


def _shutting_down() -> Fault:
    return Fault(errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down", retry_seconds=2.0)


def _short(reason: inference_pb2.FinishReason.ValueType) -> str:
    return inference_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
