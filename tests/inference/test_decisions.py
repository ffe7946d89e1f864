"""The pure rooms: requests, which base answers, precision."""

from __future__ import annotations

import pytest

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2, messages_pb2
from services.common.errors import Fault
from services.common.facts import AdapterFacts, ModelFacts
from services.inference import choosing, messages, precision, wire
from tests.inference.kit import turn

MODEL = ModelFacts(
    "X", "x", 1_000_000, 600_000, 512, 100, ("q_proj",), "sha256:t", "sha256:c", True, "2026-01-01", (1,)
)


def fields(fault: Fault) -> list[str]:
    return [v.field for v in fault.violations]


def test_every_violation_of_a_request_is_told_at_once() -> None:
    request = inference_pb2.GenerateRequest(
        adapter="ada", model="nonsense", request_id="with blank", prompt="",
        options=inference_pb2.GenerationOptions(
            max_tokens=0, temperature=2.5, top_p=0.0, stop=["", "x" * 65, *"abcdefg"]
        ),
    )  # fmt: skip
    with pytest.raises(Fault) as caught:
        messages.generate_ask(request, 512, "id")
    assert fields(caught.value) == [
        "adapter", "model", "request_id", "options.max_tokens", "options.temperature", "options.top_p",
        "options.stop", "options.stop[0]", "options.stop[1]", "prompt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([], "conversation.messages"),
        ([turn(messages_pb2.ROLE_UNSPECIFIED, "x")], "conversation.messages[0].role"),
        ([turn(messages_pb2.ROLE_USER, "")], "conversation.messages[0].parts"),
        ([turn(messages_pb2.ROLE_USER, "x"), turn(messages_pb2.ROLE_ASSISTANT, "y")], "conversation.messages[1].role"),
        ([turn(messages_pb2.ROLE_USER, "x"), turn(messages_pb2.ROLE_SYSTEM, "y")], "conversation.messages[1].role"),
        (
            [messages_pb2.Message(role=messages_pb2.ROLE_USER, parts=[messages_pb2.Part(text="x")],
                                  tool_calls=[messages_pb2.ToolCall(name="f", arguments_json="{}")])],
            "conversation.messages[0].tool_calls",
        ),
        (
            [messages_pb2.Message(role=messages_pb2.ROLE_ASSISTANT,
                                  tool_calls=[messages_pb2.ToolCall(name="f", arguments_json="[1]")]),
             turn(messages_pb2.ROLE_TOOL, "y")],
            "conversation.messages[0].tool_calls[0].arguments_json",
        ),
    ],
)  # fmt: skip
def test_a_conversation_that_no_one_can_answer_names_its_turn(turns: list[messages_pb2.Message], field: str) -> None:
    assert [v.field for v in messages.check_conversation(messages_pb2.Conversation(messages=turns))] == [field]


def test_a_sound_conversation_passes() -> None:
    calls = [messages_pb2.ToolCall(name="f", arguments_json='{"a": 1}')]
    turns = [
        turn(messages_pb2.ROLE_SYSTEM, "s"), turn(messages_pb2.ROLE_USER, "u"),
        messages_pb2.Message(role=messages_pb2.ROLE_ASSISTANT, tool_calls=calls), turn(messages_pb2.ROLE_TOOL, ""),
    ]  # fmt: skip
    tools = [messages_pb2.Tool(name="f")]
    assert messages.check_conversation(messages_pb2.Conversation(messages=turns, tools=tools)) == []


ONE, TWO = ("sha256:1", "models/one"), ("sha256:2", "models/two")


def test_a_base_is_chosen_by_model_then_adapter_then_default_then_being_the_only_one() -> None:
    def choose(model: str = "", adapter: str = "", default: str = "", loaded: list = [ONE, TWO]) -> str:  # noqa: B006
        return choosing.choose_base(model, "models/m", "adapters/a", adapter, default, loaded)

    assert choose(model="sha256:2", default="sha256:1") == "sha256:2"
    assert choose(adapter="sha256:3", default="sha256:1") == "sha256:3", "loaded or not"
    assert choose(model="sha256:3", adapter="sha256:3") == "sha256:3"
    assert choose(default="sha256:1") == "sha256:1"
    assert choose(loaded=[TWO]) == "sha256:2"
    for wrong, reason, word in (
        ({}, errors_pb2.REASON_INVALID_REQUEST, "models/one, models/two"),
        ({"loaded": []}, errors_pb2.REASON_NOT_FOUND, "no model is loaded"),
        ({"model": "sha256:3"}, errors_pb2.REASON_NOT_FOUND, "models/two"),
        ({"model": "sha256:1", "adapter": "sha256:2"}, errors_pb2.REASON_REJECTED, "check 'base'"),
    ):
        with pytest.raises(Fault) as caught:
            choose(**wrong)
        assert caught.value.reason == reason and word in caught.value.message


def test_lineage_names_the_first_thing_that_differs() -> None:
    right = {"base_digest": "sha256:b", "tokenizer_digest": "sha256:t", "template_digest": "sha256:c"}
    choosing.check_lineage("a", artifacts_pb2.Manifest(lineage=artifacts_pb2.Lineage(**right)), "sha256:b", MODEL)
    for what in ("base", "tokenizer", "template"):
        wrong = artifacts_pb2.Lineage(**{**right, f"{what}_digest": "sha256:other"})
        with pytest.raises(Fault) as caught:
            choosing.check_lineage("adapters/a", artifacts_pb2.Manifest(lineage=wrong), "sha256:b", MODEL)
        assert caught.value.reason == errors_pb2.REASON_REJECTED
        assert f"check '{what}'" in caught.value.message and "sha256:other" in caught.value.message


def test_an_adapter_with_a_prompt_format_is_compared_with_that() -> None:
    told = {"base_digest": "sha256:b", "tokenizer_digest": "sha256:t", "template_digest": "sha256:format"}
    manifest = artifacts_pb2.Manifest(lineage=artifacts_pb2.Lineage(**told))
    choosing.check_lineage("a", manifest, "sha256:b", MODEL, "sha256:format")
    for served in ("", "sha256:another"):
        with pytest.raises(Fault, match="check 'template'"):
            choosing.check_lineage("a", manifest, "sha256:b", MODEL, served)


@pytest.mark.parametrize(
    ("device", "free", "bf16", "chosen"),
    [
        ("cpu", 2_500_000, True, "BF16"),
        ("cpu", 2_499_999, True, "INT8"),
        ("cpu", 1_249_999, True, "INT4"),
        ("cpu", 5_000_000, False, "FP32"),
        ("cpu", 4_999_999, False, "INT8"),
        ("cpu", 0, False, "INT4"),
        ("cuda:0", 2_500_000, True, "BF16"),
        ("cuda:0", 2_499_999, True, "NF4"),
        ("cuda:0", 4_999_999, False, "NF4"),
        ("mps", 5_000_000, False, "FP32"),
    ],
)
def test_precision_follows_device_and_free_bytes(device: str, free: int, bf16: bool, chosen: str) -> None:
    found, why = precision.choose(inference_pb2.PRECISION_UNSPECIFIED, MODEL, precision.Place(device, free, bf16))
    assert inference_pb2.Precision.Name(found) == f"PRECISION_{chosen}" and chosen.lower() in why


def test_what_was_asked_for_is_held() -> None:
    place = precision.Place("cpu", 0, True)
    assert precision.choose(inference_pb2.PRECISION_FP32, MODEL, place) == (inference_pb2.PRECISION_FP32, "asked for")
    sizes = [precision.bytes_of(p, MODEL) for p in inference_pb2.Precision.values()[1:]]
    assert sizes == [600_000, 2_000_000, 4_000_000, 1_000_000, 625_000]
    assert precision.smaller("cpu") == (inference_pb2.PRECISION_INT8, inference_pb2.PRECISION_INT4)
    assert precision.smaller("cuda:1") == (inference_pb2.PRECISION_NF4,)
    told = AdapterFacts(4, 8.0, ("q_proj",), 1_000, ())
    assert precision.adapter_bytes(told, inference_pb2.PRECISION_FP32) == 4_000
    assert precision.adapter_bytes(told, inference_pb2.PRECISION_INT4) == 2_000


def test_a_fault_survives_the_way_from_the_engine() -> None:
    fault = choosing.not_loaded("adapters/ad", ["adapters/ada"])
    assert "did you mean 'adapters/ada'" in fault.message
    back = wire.unpack(wire.pack(fault))
    assert (back.reason, back.message, back.resource) == (fault.reason, fault.message, fault.resource)
