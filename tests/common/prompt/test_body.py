"""Lines read straight into what templates see: the same as by way of a message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.prompt import example
from services.common.prompt.body import Chat, Gap, Pair, Place, Text, body_of, read
from services.common.prompt.example import ExampleError
from tests.common.prompt.models import chat, completion
from tests.common.prompt.talks import talk

TEXT = st.text(max_size=15)


@st.composite
def examples(draw: st.DrawFn) -> datasets_pb2.Example:
    kind = draw(st.sampled_from(["chat", "random", "completion", "infill", "preference", "none"]))
    if kind == "random":
        return talk(draw(st.integers(0, 1000)))
    made = datasets_pb2.Example(origin=datasets_pb2.Origin(file=draw(TEXT), line=draw(st.integers(0, 2**40))))
    made.metadata.update({draw(TEXT): draw(TEXT)})
    if kind == "completion":
        made.completion.prompt, made.completion.completion = draw(TEXT), draw(TEXT)
    elif kind == "infill":
        made.infill.prefix, made.infill.middle, made.infill.suffix = draw(TEXT), draw(TEXT), draw(TEXT)
    elif kind == "preference":
        made.preference.prompt.messages.add(role=messages_pb2.ROLE_USER)
    elif kind == "chat":
        made.chat.SetInParent()
        for _ in range(draw(st.integers(0, 4))):
            message = made.chat.messages.add(role=draw(st.sampled_from(messages_pb2.Role.values())))
            for text in draw(st.lists(TEXT, max_size=3)):
                message.parts.add(text=text)
            if draw(st.booleans()):
                message.tool_calls.add(
                    id=draw(TEXT),
                    name=draw(TEXT),
                    arguments_json=draw(st.sampled_from(["", "{}", '{"a": [1.0]}', "[", "3"])),
                )
            message.tool_call_id, message.name = draw(TEXT), draw(TEXT)
        made.chat.tools.add(name=draw(TEXT), parameters_json=draw(st.sampled_from(["", '{"b": null}', "x"])))
    return made


def slow(line: bytes, parts: bool) -> Any:
    made = example.loads(line)
    place = Place(made.origin.file, made.origin.line)
    try:
        return place, body_of(made, parts)
    except ExampleError as e:
        return place, str(e), e.turn


@settings(max_examples=200, deadline=None)
@given(examples(), st.booleans())
def test_a_line_is_read_as_its_message_is(made: datasets_pb2.Example, parts: bool) -> None:
    line = example.dumps(made)
    place, body = read(line, parts)
    found = (place, str(body), body.turn) if isinstance(body, ExampleError) else (place, body)
    assert found == slow(line, parts)


@pytest.mark.parametrize(
    "plain",
    [
        {"chat": {"messages": [{"role": 2, "parts": [{"text": "a"}]}]}, "origin": {"line": 3}},
        {"chat": {"messages": [{"role": "ROLE_USER", "parts": [{"text": "a"}], "toolCallId": "c"}]}},
        {"chat": {"messages": None}},
        {"completion": {"prompt": None, "completion": "a"}},
        {"chat": {}, "metadata": {"a": [1, None]}},
        {"chat": {"messages": [{"role": "ROLE_USER", "parts": [{}]}]}},
        {"origin": {"file": "x", "line": "4"}},
    ],
)
def test_other_ways_to_write_it_give_the_same(plain: dict[str, Any]) -> None:
    line = json.dumps(plain).encode()
    assert read(line) == slow(line, False)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b"\xff",
        b'{"chit": {}}',
        b'{"chat": {"massages": []}}',
        b'{"chat": {"messages": [{"role": "ROLE_USER", "part": []}]}}',
        b'{"chat": {"messages": [{"role": "ROLE_KING"}]}}',
        b'{"chat": {"messages": [{"role": "ROLE_USER", "parts": [{"text": 3}]}]}}',
        b'{"chat": {"messages": 3}}',
        b'{"completion": {"prompt": 3}}',
        b'{"chat": {}, "completion": {}}',
        b'{"origin": {"row": 1}, "chat": {}}',
        b'{"origin": 3, "chat": {}}',
    ],
)
def test_a_line_that_is_no_example_is_an_error(line: bytes) -> None:
    with pytest.raises(ExampleError):
        read(line)


def test_bodies() -> None:
    made = chat(("user", "a"), ("assistant", "b"), line=7)
    made.chat.messages[0].parts.add(text="c")
    place, body = read(example.dumps(made))
    assert str(place) == "rows.jsonl:7" and isinstance(body, Chat) and body.tools is None
    assert body.messages == [{"role": "user", "content": "ac"}, {"role": "assistant", "content": "b"}]
    told = read(example.dumps(made), parts=True)[1]
    assert isinstance(told, Chat) and told.messages[0]["parts"] == ["a", "c"]
    assert read(example.dumps(completion("a", "b")))[1] == Text("a", "b")
    gap = datasets_pb2.Example(infill=datasets_pb2.Infill(prefix="a", middle="b", suffix="c"))
    assert read(example.dumps(gap))[1] == Gap("a", "b", "c")
    pair = datasets_pb2.Example(preference=datasets_pb2.Preference(plain=True))
    assert read(example.dumps(pair))[1] == Pair()
    assert read(b"{}") == (Place("", 0), None)
