"""Random rows of every form, as their own users write them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from services.datasets.forms import (
    CANONICAL,
    CHAT,
    COMPLETION,
    INFILL,
    INSTRUCTION,
    PREFERENCE,
    SHAREGPT,
    TEXT,
)

_ODD = (
    *("வணக்கம் 👋🏽", "שלום", "مرحبا بك", "a\r\nb", "\tx\t", "\n\n", "\n\nx", "", " \u2028"),
    *("你好", '{"a": [1]}', "[1, 2]", "0"),
)
text = st.sampled_from(_ODD) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
full = text.filter(lambda t: bool(t.strip()))
_number = st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False, width=32).filter(
    lambda f: not f.is_integer()
)
plain = st.recursive(
    st.none() | st.booleans() | _number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=4,
)
extras = st.dictionaries(text.map(lambda t: "x-" + t), plain, max_size=2)
objects = st.dictionaries(text, plain, max_size=2)
_JSON_TEXTS = ('{"a":1}', '{ "b": 1.0 }', '{"c": 1e3}', '{"é": "\\u00e9"}', '{"n": 123456789012345678901234567890}')
arguments = objects.map(lambda o: json.dumps(o, ensure_ascii=False)) | st.sampled_from(_JSON_TEXTS)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    made: dict[str, Any] = {"id": draw(full)} if draw(st.booleans()) else {}
    made |= {"type": "function", "function": {"name": draw(full), "arguments": draw(arguments)}}
    if draw(st.integers(0, 3)) == 0:
        made["x-at"] = draw(plain)
    if draw(st.integers(0, 3)) == 0:
        made["function"]["x-in"] = draw(plain)
    return made


@st.composite
def tools(draw: st.DrawFn) -> dict[str, Any]:
    function: dict[str, Any] = {"name": draw(full)}
    if draw(st.booleans()):
        function["description"] = draw(full)
    if draw(st.booleans()):
        function["parameters"] = draw(objects)
    if draw(st.booleans()):
        function["strict"] = True
    return {"type": "function", "function": function}


_cut = st.lists(text, min_size=2, max_size=3).filter(lambda ts: any(t.strip() for t in ts))
content = full | _cut.map(lambda ts: [{"type": "text", "text": t} for t in ts])
# Fields of a row's own that look like places of others.
MISLEADING = st.dictionaries(
    st.sampled_from(
        [
            *("messages[0].role", "messages[0].content", "messages[1].tool_calls", "messages[1].function_call"),
            *("messages[0].from", "messages[1].from", "messages[1].content[0].text", "messages[0].content[1].x"),
            *("messages[1].tool_calls[0].id", "messages[1].tool_calls[0].function/name", "messages[9].x"),
            *("messages[1].function_call.weight", "messages[1].value", "tools[0].function", "tools[0].function/name"),
            *("tools[0].tool_calls[0].x", "chosen[0].role", "prompt[0].y", "rejected[0].tool_calls", "question"),
            *(
                "context",
                "response",
                "fim_prefix",
                "content",
                "conversation",
                "functions",
                "history",
                "text",
                "messages",
            ),
        ]
    ),
    st.sampled_from(("bard", "x", 1, None)),
    max_size=3,
)


@st.composite
def talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(content)})
        if draw(st.integers(0, 2)) == 0:
            asked = draw(st.lists(calls(), min_size=1, max_size=2))
            messages.append({"role": "assistant", "content": draw(st.none() | content), "tool_calls": asked})
            for one in asked:
                told = {"tool_call_id": one["id"]} if "id" in one else {}
                messages.append({"role": "tool", "content": draw(text), **told})
        messages.append({"role": "assistant", "content": draw(content)})
    if draw(st.integers(0, 3)) == 0:
        draw(st.sampled_from(messages))["name"] = draw(full)
    if draw(st.integers(0, 3)) == 0:
        draw(st.sampled_from(messages))["x-weight"] = draw(plain)
    return messages


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": draw(talks())}
    if draw(st.booleans()):
        row["tools"] = draw(st.lists(tools(), min_size=1, max_size=2))
    return {**row, **draw(extras)}


@st.composite
def sharegpts(draw: st.DrawFn) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"from": "system", "value": draw(full)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        turns.append({"from": "human", "value": draw(full)})
        if draw(st.integers(0, 2)) == 0:
            if draw(st.booleans()):
                turns.append({"from": "gpt", "value": draw(full)})
            asked = [{"name": draw(full), "arguments": draw(objects)} for _ in range(draw(st.integers(1, 2)))]
            if draw(st.booleans()):
                asked[0] |= {"id": draw(full), "x-at": draw(plain)}
            value = json.dumps(asked[0] if len(asked) == 1 else asked, ensure_ascii=False)
            turns.append({"from": "function_call", "value": value})
            if draw(st.integers(0, 3)) == 0:
                turns[-1]["weight"] = turns[-2]["weight"] = draw(plain)
            turns.append({"from": "observation", "value": draw(text)})
        turns.append({"from": draw(st.sampled_from(("gpt", "gpt", "bard"))), "value": draw(full)})
    if draw(st.booleans()):
        draw(st.sampled_from(turns))["weight"] = draw(plain)
    row: dict[str, Any] = {"conversations": turns}
    if draw(st.booleans()):
        row["tools"] = json.dumps(draw(st.lists(tools(), min_size=1, max_size=2)), ensure_ascii=False)
    return {**row, **draw(extras)}


@st.composite
def preferences(draw: st.DrawFn) -> dict[str, Any]:
    answers = draw(st.lists(full, min_size=2, max_size=2, unique=True))
    row: dict[str, Any] = dict(zip(("chosen", "rejected"), answers, strict=True))
    row["prompt"] = draw(full)
    if draw(st.booleans()):
        row = {k: [{"role": "assistant", "content": v}] for k, v in row.items()}
        row["prompt"] = [*draw(talks()), {"role": "user", "content": draw(content)}]
        if draw(st.booleans()):
            row["rejected"] += [{"role": "user", "content": draw(full)}, {"role": "assistant", "content": draw(full)}]
        if draw(st.booleans()):
            row["chosen"][0]["x-score"] = draw(plain)
    if draw(st.integers(0, 3)) == 0:
        row["tools"] = [draw(tools())]
    return {**row, **draw(extras)}


@st.composite
def instructions(draw: st.DrawFn) -> dict[str, Any]:
    row = {"instruction": draw(full), "input": draw(text), "output": draw(full)}
    if draw(st.booleans()):
        row["system"] = draw(text.filter(bool))
    if draw(st.integers(0, 2)) == 0:
        row["history"] = draw(st.lists(st.tuples(full, full).map(list), min_size=1, max_size=2))
    return {**row, **draw(extras)}


# As an export writes them, so that a row which is read and written again is the same row.
ROWS: dict[Any, st.SearchStrategy[dict[str, Any]]] = {
    CHAT: chats(),
    INSTRUCTION: instructions(),
    COMPLETION: st.builds(lambda p, c, e: {"prompt": p, "completion": c, **e}, text, full, extras),
    TEXT: st.builds(lambda t, e: {"text": t, **e}, full, extras),
    SHAREGPT: sharegpts(),
    PREFERENCE: preferences(),
    INFILL: st.builds(lambda p, m, s, e: {"prefix": p, "middle": m, "suffix": s, **e}, text, full, text, extras),
}
any_row = st.sampled_from(list(ROWS)).flatmap(lambda form: st.tuples(st.just(form), ROWS[form]))


@st.composite
def canonicals(draw: st.DrawFn) -> dict[str, Any]:
    from services.datasets.worker import forms

    form, row = draw(any_row)
    example, _ = forms.example_of(row, form, {})
    if draw(st.booleans()):
        example["origin"] = {"file": draw(full), "line": "7"}
    return example


ROWS[CANONICAL] = canonicals()
