"""Every call's request, checked: all that is wrong at once, and nothing wrong goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorad.v1 import inference_pb2 as pb
from qlorad.v1 import messages_pb2
from services.common.errors import Fault
from services.inference import messages
from services.inference.answering import submit_of
from services.inference.preset import INPUT
from services.inference.reach import Held
from tests.inference.kit import turn
from tests.inference.strategies import anything

PRESETS = {
    "presets/brief": pb.Preset(
        name="presets/brief",
        system="Be brief.",
        template=f"In short: {INPUT}",
        options=pb.GenerationOptions(max_tokens=9, temperature=0.5),
    )
}
USER = messages_pb2.Conversation(messages=[turn(messages_pb2.ROLE_USER, "x")])


def fields(call: Callable[[], object]) -> list[str]:
    """Fields that a call is refused for."""
    with pytest.raises(Fault) as caught:
        call()
    return [v.field for v in caught.value.violations]


def test_all_that_is_wrong_with_a_batch_is_told_at_once() -> None:
    items = [
        pb.BatchItem(),
        pb.BatchItem(prompt="x"),
        pb.BatchItem(adapter="ada", model="m", conversation=messages_pb2.Conversation()),
        pb.BatchItem(prompt="x", options=pb.GenerationOptions(temperature=9)),
    ]
    request = pb.GenerateBatchRequest(items=items, request_id="with blank", priority=11)
    assert fields(lambda: messages.batch_asks(request, 512, "id")) == [
        "request_id", "priority", "items[0].prompt", "items[2].adapter", "items[2].model",
        "items[2].conversation.messages", "items[3].options.temperature",
    ]  # fmt: skip
    for count in (0, 257):
        many = pb.GenerateBatchRequest(items=[pb.BatchItem(prompt="x")] * count)
        assert fields(lambda many=many: messages.batch_asks(many, 0, "id")) == ["items"]
    good = messages.batch_asks(pb.GenerateBatchRequest(items=items[1:2] * 3, priority=-10), 0, "id")
    assert [(a.prompt, a.priority, a.request_id) for a in good] == [("x", -10, "id")] * 3


def test_what_one_answer_tells_is_bounded_and_the_nearest_that_would_do_is_named() -> None:
    def told(*much: int) -> str:
        with pytest.raises(Fault) as caught:
            messages.check_told("prompt", *much)
        return str(caught.value)

    assert told(500_001) == "prompt: got 500001 tokens; accepted: at most 500000 tokens in one answer"
    several = "alternatives: got 20 for each of 30000 tokens; accepted: at most 15 for so many tokens, or 23809 tokens"
    assert told(30_000, 20) == several
    for good in ((500_000, 0), (30_000, 15), (23_809, 20), (1, 20)):
        messages.check_told("prompt", *good)


def test_a_comparison_needs_two_who_differ() -> None:
    def ask(*adapters: str, **more: Any) -> list[messages.Ask]:
        request = pb.CompareRequest(adapters=adapters, **({"conversation": USER} | more))
        return messages.compare_asks(request, 512, "id", 77, PRESETS)

    assert fields(lambda: ask("base")) == ["adapters"]
    assert fields(lambda: ask(*(f"adapters/a{n}" for n in range(17)))) == ["adapters"]
    assert fields(lambda: ask("base", "adapters/a", "base", "a", "")) == ["adapters[2]", "adapters[3]", "adapters[4]"]
    with_prompt = pb.CompareRequest(adapters=["base", "adapters/a"], prompt="x", preset="presets/brief")
    assert fields(lambda: messages.compare_asks(with_prompt, 512, "id", 77, PRESETS)) == ["preset"]
    asks = ask("base", "adapters/a", preset="presets/brief")
    assert [a.adapter for a in asks] == ["base", "adapters/a"]
    assert {a.inherited.seed for a in asks} == {77}, "all draw by one seed"
    assert all(a.conversation.messages[-1].parts[0].text == "In short: x" for a in asks if a.conversation)
    seeded = ask("base", "adapters/a", options=pb.GenerationOptions(seed=0))
    assert {a.options.seed for a in seeded} == {0}, "the request's own is heard first"


def test_a_preset_is_found_by_name_and_said_less_loudly_than_the_request() -> None:
    def ask(**more: Any) -> messages.Ask:
        return messages.chat_ask(pb.ChatRequest(**({"conversation": USER} | more)), 512, "id", PRESETS)

    told = ask(preset="presets/brief", options=pb.GenerationOptions(temperature=0.0))
    assert (told.inherited.max_tokens, told.options.temperature) == (9, 0.0)
    assert not told.options.HasField("max_tokens")
    assert fields(lambda: ask(preset="brief", priority=99)) == ["priority", "preset"]
    with pytest.raises(Fault, match="did you mean 'presets/brief'"):
        ask(preset="presets/breif")
    system = messages_pb2.Conversation(messages=[turn(messages_pb2.ROLE_SYSTEM, "s")])
    assert fields(lambda: ask(preset="presets/brief", conversation=system)) == ["conversation.messages"]


def test_what_cannot_fit_is_refused_by_its_bytes() -> None:
    context = 64
    most = context * messages.BYTES_A_TOKEN
    for text, wrong in (("x" * most, False), ("x" * (most + 1), True), ("é" * (most // 2 + 1), True)):
        request = pb.GenerateRequest(prompt=text)
        if wrong:
            assert fields(lambda request=request: messages.generate_ask(request, context, "id")) == ["prompt"]
        else:
            messages.generate_ask(request, context, "id")
    huge = pb.GenerateRequest(prompt="x" * (messages.MAX_INPUT_BYTES + 1))
    assert fields(lambda: messages.generate_ask(huge, 0, "id")) == ["prompt"]
    halves = [pb.BatchItem(prompt="x" * (messages.MAX_INPUT_BYTES // 2))] * 2
    assert fields(lambda: messages.batch_asks(pb.GenerateBatchRequest(items=halves), 0, "id")) == ["items"]
    grown = {"presets/brief": pb.Preset(name="presets/brief", template="y" * most + INPUT)}
    chat = pb.ChatRequest(conversation=USER, preset="presets/brief")
    assert fields(lambda: messages.chat_ask(chat, context, "id", grown)) == ["conversation"]


def test_a_named_adapter_may_bring_a_longer_context_so_it_is_held_against_that() -> None:
    text, options = "x" * (65 * messages.BYTES_A_TOKEN), pb.GenerationOptions(max_tokens=65)
    for adapter in ("", "base", "nonsense"):
        request = pb.GenerateRequest(adapter=adapter, prompt=text, options=options)
        assert fields(lambda request=request: messages.generate_ask(request, 64, "id"))[-2:] == [
            "options.max_tokens", "prompt",
        ]  # fmt: skip
    ask = messages.generate_ask(pb.GenerateRequest(adapter="adapters/a", prompt=text, options=options), 64, "id")
    assert fields(lambda: messages.check_fit(ask, 64)) == ["options.max_tokens", "prompt"]
    messages.check_fit(ask, 65)
    talk = messages.chat_ask(pb.ChatRequest(adapter="adapters/a", conversation=USER), 64, "id", PRESETS)
    messages.check_fit(talk, 64)


def test_a_score_needs_something_to_score() -> None:
    def ask(**more: Any) -> messages.Ask:
        return messages.score_ask(pb.ScoreRequest(**more), 512, "id")

    assert fields(ask) == ["prompt"]
    assert fields(lambda: ask(conversation=USER, alternatives=21)) == ["alternatives", "conversation.messages"]
    answered = messages_pb2.Conversation(messages=[*USER.messages, turn(messages_pb2.ROLE_ASSISTANT, "y")])
    assert ask(conversation=answered).conversation == answered, "here the assistant may have the last word"
    assert ask(prompt="x y").prompt == "x y"
    assert fields(lambda: messages.tokenize_ask(pb.TokenizeRequest(model="m"))) == ["model", "text"]


def held(**more: Any) -> Held:
    told = {"context_tokens": 64, "adapter_digest": "sha256:a", "defaults": pb.GenerationOptions()} | more
    return Held(None, "sha256:m", pb.PRECISION_FP32, **told)  # type: ignore[arg-type]


def test_an_engine_is_told_everything_and_whose_it_is() -> None:
    ask = messages.Ask(
        prompt="x",
        priority=3,
        options=pb.GenerationOptions(top_k=5),
        inherited=pb.GenerationOptions(top_k=9, max_tokens=900, temperature=0.5),
    )
    sealed = pb.GenerationOptions(temperature=0.9, min_p=0.1, stop=["z"])
    submit = submit_of(ask, held(defaults=sealed), "ada")
    said = submit.options
    assert (said.top_k, said.temperature, list(said.stop)) == (5, 0.5, ["z"])
    assert said.min_p == pytest.approx(0.1) and said.top_p == 1.0 and said.HasField("seed")
    assert said.max_tokens == 64, "what is inherited bends to the model"
    assert (submit.priority, submit.who, submit.adapter_digest) == (3, "ada", "sha256:a")
    long = messages.Ask(prompt="x", options=pb.GenerationOptions(max_tokens=65))
    assert fields(lambda: submit_of(long, held(), "")) == ["options.max_tokens"], "what is said is refused, not bent"


CHECKS: dict[type, Callable[[Any], object]] = {
    pb.GenerateRequest: lambda r: messages.generate_ask(r, 512, "id"),
    pb.ChatRequest: lambda r: messages.chat_ask(r, 512, "id", PRESETS),
    pb.GenerateBatchRequest: lambda r: messages.batch_asks(r, 512, "id"),
    pb.CompareRequest: lambda r: messages.compare_asks(r, 512, "id", 1, PRESETS),
    pb.ScoreRequest: lambda r: messages.score_ask(r, 512, "id"),
    pb.RenderRequest: lambda r: messages.render_ask(r, 512, PRESETS),
    pb.TokenizeRequest: lambda r: messages.tokenize_ask(r),
}


@pytest.mark.parametrize("kind", CHECKS, ids=lambda k: k.__name__)
@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_however_odd_does_worse_than_a_refusal(kind: type, data: st.DataObject) -> None:
    request = data.draw(anything(kind.DESCRIPTOR))
    before = request.SerializeToString(deterministic=True)
    try:
        CHECKS[kind](request)
    except Fault as fault:
        assert fault.violations or fault.resource
    assert request.SerializeToString(deterministic=True) == before, "a request is never written to"
