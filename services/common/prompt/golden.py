"""Golden renderings: what an adapter's training rows looked like, kept with it.

Law of this room: pure. A rendering holds its own conversation, so it can be
checked for as long as the adapter lives, whatever this file says then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from services.common.errors import rejected, show
from services.common.prompt.render import Renderer, RenderError

WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells today's weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "The place's <name>"}},
            "required": ["place"],
        },
    },
}
_TURNS = [
    {"role": "user", "content": "Write a function that adds two numbers."},
    {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
    {"role": "user", "content": "Now multiply them."},
    {"role": "assistant", "content": "def multiply(a, b):\n    return a * b\n"},
]
TOOL_TURNS: Sequence[Mapping[str, Any]] = [
    {"role": "user", "content": "How is the weather in Chennai?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"place": "Chennai"}},
                "id": "call00001",
            }
        ],
    },
    {"role": "tool", "content": '{"sky": "clear", "celsius": 31}', "tool_call_id": "call00001", "name": "get_weather"},
    {"role": "assistant", "content": "Clear, 31 °C."},
]
PROBES: tuple[tuple[str, Any, Any, bool], ...] = (
    ("one turn", _TURNS[:2], None, False),
    ("system and turns", [{"role": "system", "content": "You write short Python."}, *_TURNS], None, False),
    ("generation prompt", [{"role": "system", "content": "You write short Python."}, *_TURNS[:3]], None, True),
    ("tools", TOOL_TURNS, [WEATHER], False),
    (
        "scripts",
        [
            {"role": "user", "content": "வணக்கம், எப்படி இருக்கிறீர்கள்? 你好 👩‍👩‍👧 \u200fשלום مرحبا"},
            {"role": "assistant", "content": "நலம், நன்றி. 很好。 e\u0301 ≠ é"},
        ],
        None,
        False,
    ),
    (
        "blanks",
        [{"role": "user", "content": '  <a href="x">&amp;</a>\t\r\n\n'}, {"role": "assistant", "content": "\n it's  "}],
        None,
        False,
    ),
)


def make(renderer: Renderer) -> tuple[dict[str, Any], ...]:
    """Renderings of fixed conversations, as facts of a manifest; none where there is no template.

    A conversation that the template refuses is kept as refused.
    """
    if not renderer.has_template:
        return ()
    return tuple(_make(renderer, *probe) for probe in PROBES)


def check(renderer: Renderer, golden: Sequence[Mapping[str, Any]]) -> None:
    """REJECTED, naming the conversation and the first byte, where a rendering is not what it was."""
    for entry in golden:
        name = f"golden rendering {show(entry.get('name'))}"
        try:
            told = json.loads(entry["conversation"])
            messages, tools = told["messages"], told["tools"]
            expected = None if "refused" in entry else str(entry["text"]).encode()
            prompt = bool(entry["generation_prompt"])
        except (KeyError, TypeError, ValueError) as e:
            raise rejected(name, f"cannot be read: {type(e).__name__} {e}") from None
        try:
            found = renderer.render(messages, tools, prompt).text.encode()
        except RenderError as e:
            if expected is None:
                continue
            raise rejected(name, f"this model's chat template refuses the conversation: {e}") from None
        if expected is None:
            raise rejected(name, "was refused by the chat template of training; this model's renders it")
        if found != expected:
            at = first_difference(expected, found)
            raise rejected(
                name,
                f"first differs at byte {at}: trained with {expected[at : at + 24]!r}, "
                f"this model renders {found[at : at + 24]!r}",
            )


def first_difference(a: bytes, b: bytes) -> int:
    """Where two texts part; the shorter one's length if one begins the other."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _make(renderer: Renderer, name: str, messages: Any, tools: Any, prompt: bool) -> dict[str, Any]:
    conversation = json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)
    entry: dict[str, Any] = {"name": name, "conversation": conversation, "generation_prompt": prompt}
    try:
        # Through JSON and back, so that what is rendered is what a later check renders.
        told = json.loads(conversation)
        entry["text"] = renderer.render(told["messages"], told["tools"], prompt).text
    except RenderError as e:
        entry["refused"] = e.message
    return entry
