"""Batches, comparing, scoring, rendering, presets, limits, kept answers: against a real engine."""

from __future__ import annotations

import hashlib
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from qlorad.v1 import errors_pb2, messages_pb2
from qlorad.v1 import inference_pb2 as pb
from services.inference.messages import MAX_TOLD
from tests.house import Daemon, clone_store, eventually, house
from tests.inference import kit
from tests.inference.test_serving import ADAPTERS, named

TOKEN, LIMITED = "a-token-of-tests", "another-token"
LIMITS = """
small: {requests_per_minute: 2, tokens_per_minute: 400, max_in_flight: 1}
large: {max_priority: 3}
"""


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows a token with every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def _shown(self, details: Any) -> Any:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {self._token}")]
        return details._replace(metadata=metadata)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._shown(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._shown(client_call_details), request)


@dataclass
class Calling:
    """A daemon with keys, limits and a cache, and stubs of both keys."""

    daemon: Daemon
    stub: kit.Stub
    small: kit.Stub
    oracle: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def calling(
    tmp_path_factory: pytest.TempPathFactory, adapters_home: pathlib.Path, oracle: dict[str, list[dict[str, Any]]]
) -> Iterator[Calling]:
    folder = tmp_path_factory.mktemp("calling")
    clone_store(adapters_home, folder / "home")
    tokens, limits = folder / "tokens", folder / "limits.yaml"
    shown = {"large": TOKEN, "small": LIMITED}
    tokens.write_text("".join(f"{hashlib.sha256(t.encode()).hexdigest()} {name}\n" for name, t in shown.items()))
    limits.write_text(LIMITS)
    flags = ("--tokens-file", str(tokens), "--limits-file", str(limits), "--generation-cache-bytes", "1000000")
    with house(folder / "home") as h:
        daemon, _ = kit.start(h, *flags)
        channel = h.channel("inference")
        stub, small = (kit.Stub(grpc.intercept_channel(channel, Bearer(t))) for t in (TOKEN, LIMITED))
        kit.load(stub, "ada", "bob", "cy", "dee", "told")
        yield Calling(daemon, stub, small, oracle)


def read_all(stream: Any, count: int) -> list[kit.Answer | pb.Failure]:
    """Every answer of several; checks that each is Started, deltas and one end, whatever the order among them."""
    told: dict[int, list[Any]] = defaultdict(list)
    for message in stream:
        told[message.index].append(getattr(message, message.WhichOneof("event")))
    assert sorted(told) == list(range(count))
    ends: list[kit.Answer | pb.Failure] = []
    for index in range(count):
        events = told[index]
        if isinstance(events[-1], pb.Failure):
            assert not any(isinstance(e, pb.Finish) for e in events)
            ends.append(events[-1])
            continue
        assert isinstance(events[0], pb.Started) and isinstance(events[-1], pb.Finish)
        assert all(isinstance(e, pb.Delta) for e in events[1:-1])
        ids = [i for d in events[1:-1] for i in d.ids]
        assert events[-1].completion_tokens == len(ids)
        ends.append(kit.Answer(events[0], events[-1], "".join(d.text for d in events[1:-1]), ids))
    return ends


def good(answer: kit.Answer | pb.Failure) -> kit.Answer:
    assert isinstance(answer, kit.Answer), answer
    return answer


def talk(*texts: str) -> messages_pb2.Conversation:
    roles = (messages_pb2.ROLE_USER, messages_pb2.ROLE_ASSISTANT)
    return messages_pb2.Conversation(messages=[kit.turn(roles[n % 2], text) for n, text in enumerate(texts)])


def test_a_batch_answers_each_prompt_as_if_alone_and_fails_one_alone(calling: Calling) -> None:
    asks = [(adapter, answer) for adapter in ADAPTERS for answer in calling.oracle[adapter]]
    items = [
        pb.BatchItem(
            adapter=named(adapter),
            prompt=expected["prompt"],
            options=pb.GenerationOptions(max_tokens=len(expected["ids"])),
        )
        for adapter, expected in asks
    ]
    items.insert(4, pb.BatchItem(adapter="adapters/no-such", prompt="x"))
    items.append(pb.BatchItem(adapter="base", prompt="x\n" * 5000))
    request = pb.GenerateBatchRequest(items=items, request_id="batch-one")
    answers = read_all(calling.stub.GenerateBatch(request, timeout=60), len(items))
    missing, long = answers.pop(4), answers.pop()
    assert isinstance(missing, pb.Failure) and missing.reason == errors_pb2.REASON_NOT_FOUND
    assert "no-such" in missing.message and missing.retry_seconds == 0
    assert isinstance(long, pb.Failure) and long.reason == errors_pb2.REASON_INVALID_REQUEST
    for (adapter, expected), answer in zip(asks, answers, strict=True):
        assert good(answer).ids == expected["ids"], adapter
        assert good(answer).started.request_id == "batch-one"


def test_a_comparison_is_one_batch_of_the_same_question(calling: Calling) -> None:
    voices = ["adapters/ada", "base", "adapters/bob"]
    expected = [calling.oracle[v.removeprefix("adapters/")][0] for v in voices]
    request = pb.CompareRequest(
        adapters=voices, prompt=expected[0]["prompt"], options=pb.GenerationOptions(max_tokens=40)
    )
    answers = [good(a) for a in read_all(calling.stub.Compare(request, timeout=60), 3)]
    assert [a.ids for a in answers] == [e["ids"] for e in expected]
    drawn = pb.CompareRequest(
        adapters=voices, conversation=talk("hello"), options=pb.GenerationOptions(max_tokens=5, temperature=1.0)
    )
    seeds = {good(a).started.seed for a in read_all(calling.stub.Compare(drawn, timeout=60), 3)}
    assert len(seeds) == 1, "all draw by one seed"


def busy(calling: Calling) -> float:
    """Requests anywhere in the daemon."""
    names = ("requests_running", "requests_waiting", "places_taken")
    return sum(kit.metric(calling.daemon, f"qlorad_inference_{name}") for name in names)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_who_leaves_a_batch_takes_all_of_it_along(calling: Calling, how: str) -> None:
    """P15 for several: waiting, running and not yet begun."""
    eventually(lambda: busy(calling) == 0, what="quiet before the test")
    options = pb.GenerationOptions(max_tokens=400, ignore_end=True, temperature=1.0)
    items = [pb.BatchItem(adapter="base", prompt="import os\n", options=options) for _ in range(40)]
    stream = calling.stub.GenerateBatch(pb.GenerateBatchRequest(items=items), timeout=60 if how == "cancel" else 1.0)
    assert next(stream).HasField("started")
    if how == "cancel":
        stream.cancel()
    with pytest.raises(grpc.RpcError):
        list(stream)
    eventually(lambda: busy(calling) == 0, seconds=10, what="nothing left of the batch")
    made = kit.metric(calling.daemon, "qlorad_inference_generated_tokens_total")
    kit.generate(calling.stub, "x", max_tokens=3, temperature=0.5)
    assert kit.metric(calling.daemon, "qlorad_inference_generated_tokens_total") == made + 3


def test_what_is_shown_is_what_is_sent(calling: Calling) -> None:
    conversation = talk("Add two numbers. வணக்கம்")
    shown = calling.stub.Render(pb.RenderRequest(adapter="adapters/ada", conversation=conversation), timeout=30)
    chat = pb.ChatRequest(adapter="adapters/ada", conversation=conversation, options=pb.GenerationOptions(max_tokens=6))
    answer = kit.read(calling.stub.Chat(chat, timeout=30))
    assert len(shown.tokens) == answer.started.prompt_tokens
    assert (shown.model_digest, shown.adapter_digest) == (answer.started.model_digest, answer.started.adapter_digest)
    assert kit.generate(calling.stub, shown.text, "adapters/ada", max_tokens=6).ids == answer.ids
    cut = calling.stub.Tokenize(pb.TokenizeRequest(text=shown.text), timeout=30)
    assert [t.id for t in cut.tokens] == [t.id for t in shown.tokens] and cut.model_digest == shown.model_digest
    assert "".join(t.text for t in calling.stub.Tokenize(pb.TokenizeRequest(text="def f():")).tokens) == "def f():"


def test_scores_are_the_log_probabilities_of_generation(calling: Calling) -> None:
    prompt = "def add(a, b):\n"
    told = list(
        calling.stub.Generate(
            pb.GenerateRequest(
                prompt=prompt, adapter="adapters/bob", options=pb.GenerationOptions(max_tokens=12, log_probabilities=3)
            ),
            timeout=30,
        )
    )
    made = [lp for m in told if m.HasField("delta") for lp in m.delta.log_probabilities]
    text = "".join(m.delta.text for m in told if m.HasField("delta"))
    ids = [i for m in told if m.HasField("delta") for i in m.delta.ids]
    assert [lp.id for lp in made] == ids and all(len(lp.alternatives) == 3 for lp in made)
    assert all(lp.alternatives[0].id == lp.id for lp in made), "greedy takes the likeliest"
    request = pb.ScoreRequest(adapter="adapters/bob", prompt=prompt + text, alternatives=2)
    scored = calling.stub.Score(request, timeout=30)
    assert scored.scored_tokens == len(scored.tokens) - 1 and not scored.tokens[0].is_scored
    assert scored.log_probability == pytest.approx(sum(t.log_probability for t in scored.tokens if t.is_scored))
    begin = len(calling.stub.Tokenize(pb.TokenizeRequest(text=prompt), timeout=30).tokens)
    again = scored.tokens[begin:]
    same = [t for t, lp in zip(again, made, strict=False) if t.id == lp.id]
    assert len(same) >= 6, "the text is cut as it was made, for the most part"
    for token, lp in zip(again, made, strict=False):
        if token.id != lp.id:
            break
        assert token.log_probability == pytest.approx(lp.log_probability, abs=2e-3)
        assert [a.id for a in token.alternatives] == [a.id for a in lp.alternatives[:2]]
    other = calling.stub.Score(pb.ScoreRequest(adapter="base", prompt=prompt + text), timeout=30)
    assert other.perplexity > scored.perplexity, "bob finds his own words likelier than the base does"


def test_only_the_assistants_words_are_scored_in_a_conversation(calling: Calling) -> None:
    request = pb.ScoreRequest(adapter="base", conversation=talk("hello", "def f(): pass"))
    told = calling.stub.Score(request, timeout=30)
    counted = "".join(t.text for t in told.tokens if t.is_scored)
    assert "def f(): pass" in counted and "hello" not in counted
    assert 0 < told.scored_tokens < len(told.tokens)
    alone = kit.refused(lambda: calling.stub.Score(pb.ScoreRequest(adapter="base", prompt="x"), timeout=30))
    assert (alone.reason, alone.fields) == ("INVALID_REQUEST", ["prompt"])


def test_a_preset_puts_the_question_into_its_words_and_may_be_ones_own(calling: Calling) -> None:
    kept = pb.Preset(
        name="presets/shout", system="Shout.", template="LOUD: {input}!", options=pb.GenerationOptions(max_tokens=4)
    )
    calling.stub.CreatePreset(pb.CreatePresetRequest(preset=kept), timeout=10)
    try:
        listed = [p.name for p in calling.stub.ListPresets(pb.ListPresetsRequest(), timeout=10).presets]
        assert listed == [f"presets/{n}" for n in ("analyse-paper", "review-code", "summarise-paper", "shout")]
        shown = calling.stub.Render(
            pb.RenderRequest(adapter="base", conversation=talk("hi"), preset="presets/shout"), timeout=30
        )
        assert "LOUD: hi!" in shown.text and "Shout." in shown.text
        ask = pb.ChatRequest(adapter="base", conversation=talk("hi"), preset="presets/shout")
        answer = kit.read(calling.stub.Chat(ask, timeout=30))
        assert answer.started.prompt_tokens == len(shown.tokens)
        assert answer.finish.completion_tokens <= 4
        ask.options.max_tokens = 2
        assert kit.read(calling.stub.Chat(ask, timeout=30)).finish.completion_tokens <= 2
    finally:
        calling.stub.DeletePreset(pb.DeletePresetRequest(name="presets/shout"), timeout=10)
    gone = kit.refused(lambda: calling.stub.Chat(ask, timeout=30))
    assert gone.reason == "NOT_FOUND" and "presets/shout" in gone.message


def test_an_adapter_brings_its_own_defaults(calling: Calling) -> None:
    """ "told" was sealed with max_tokens 5 and seed 3: a request that says nothing has those."""
    request = pb.GenerateRequest(prompt="def f():", adapter="adapters/told")
    answer = kit.read(calling.stub.Generate(request, timeout=30))
    assert (answer.finish.completion_tokens, answer.started.seed) == (5, 3)
    request.options.max_tokens = 2
    assert kit.read(calling.stub.Generate(request, timeout=30)).finish.completion_tokens == 2
    assert kit.generate(calling.stub, "def f():", "adapters/ada").finish.completion_tokens > 5


def test_the_same_greedy_question_is_answered_from_the_cache_and_alike(calling: Calling) -> None:
    prompt = "class Kept:\n    def"

    def ask(**how: Any) -> kit.Answer:
        return kit.generate(calling.stub, prompt, "adapters/cy", **({"max_tokens": 9} | how))

    hits = kit.metric(calling.daemon, "qlorad_inference_generation_cache_total")
    first, second, seeded = ask(), ask(), ask(seed=4)
    assert [a.finish.from_cache for a in (first, second, seeded)] == [False, True, True]
    assert (second.text, second.ids, second.finish.reason) == (first.text, first.ids, first.finish.reason)
    assert seeded.started.seed == 4 and second.started.prompt_tokens == first.started.prompt_tokens
    assert not ask(max_tokens=8).finish.from_cache, "another question"
    assert not any(ask(temperature=0.7, seed=1).finish.from_cache for _ in range(2)), "what draws is not kept"
    other = kit.generate(calling.stub, prompt, "adapters/bob", max_tokens=9)
    assert not other.finish.from_cache and other.ids != first.ids
    assert kit.metric(calling.daemon, "qlorad_inference_generation_cache_total") == hits + 5
    assert kit.metric(calling.daemon, "qlorad_inference_generation_cache_bytes") > 0


def test_what_is_more_than_one_answer_tells_is_refused_by_name(calling: Calling) -> None:
    text = "\x01" * (MAX_TOLD + 1)
    much = kit.refused(lambda: calling.stub.Tokenize(pb.TokenizeRequest(text=text), timeout=30))
    assert (much.code, much.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])
    assert f"{MAX_TOLD + 1} tokens" in much.message and f"at most {MAX_TOLD} tokens" in much.message
    assert len(calling.stub.Tokenize(pb.TokenizeRequest(text=text[:9]), timeout=30).tokens) == 9


def test_no_key_goes_before_others_unless_it_may(calling: Calling) -> None:
    """Every call that has a priority is held against what its key may ask for."""
    talked, how = talk("x"), pb.GenerationOptions(max_tokens=1)

    def asked(stub: kit.Stub, priority: int) -> list[Any]:
        compared = pb.CompareRequest(adapters=["base", "adapters/ada"], prompt="x", options=how, priority=priority)
        items = [pb.BatchItem(prompt="x", adapter="base", options=how)]
        return [
            stub.Generate(pb.GenerateRequest(prompt="x", adapter="base", options=how, priority=priority)),
            stub.Chat(pb.ChatRequest(conversation=talked, adapter="base", options=how, priority=priority)),
            stub.GenerateBatch(pb.GenerateBatchRequest(items=items, priority=priority)),
            stub.Compare(compared),
            stub.Score.future(pb.ScoreRequest(prompt="def f():", adapter="base", priority=priority)),
        ]

    def ends(calls: list[Any]) -> list[Any]:
        return [kit.refused(lambda call=call: call.result() if call is calls[-1] else call) for call in calls]

    for refused in ends(asked(calling.stub, 4)):
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["priority"])
        assert "accepted: -10 to 3 for this key" in refused.message and "max_priority" in refused.message
    for refused in ends(asked(calling.small, 1)):
        assert refused.fields == ["priority"] and "accepted: -10 to 0 for this key" in refused.message
    *streams, score = asked(calling.stub, 3)
    assert all(list(stream) for stream in streams) and score.result().scored_tokens


def test_a_key_gets_what_it_may_and_hears_when_to_come_again(calling: Calling) -> None:
    request = pb.GenerateRequest(
        prompt="import os\n",
        adapter="base",
        options=pb.GenerationOptions(max_tokens=300, ignore_end=True, temperature=1.0),
    )
    running = calling.small.Generate(request, timeout=60)
    assert next(running).HasField("started")
    second = kit.refused(lambda: calling.small.Generate(request, timeout=60))
    assert (second.code, second.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert second.info.metadata["limit"] == "max_in_flight" and second.retry_seconds > 0
    assert kit.generate(calling.stub, "x", max_tokens=2).text is not None, "others are not held up"
    assert kit.read_rest(running).completion_tokens == 300, "what was let in completes"
    kit.read(calling.small.Generate(pb.GenerateRequest(prompt="import", adapter="base"), timeout=60))
    spent = kit.refused(lambda: calling.small.Generate(request, timeout=60))
    assert spent.reason == "RATE_LIMITED" and spent.info.metadata["limit"] in (
        "requests_per_minute", "tokens_per_minute",
    )  # fmt: skip
    assert 0 < spent.retry_seconds <= 60
