"""Random conversations in many scripts, by a seed."""

from __future__ import annotations

import random
from typing import Any

from qlorad.v1 import datasets_pb2, messages_pb2

STRANGE = (
    "வணக்கம் உலகம், நலமா?",
    "你好，世界。",
    "👩‍👩‍👧🏽 🇮🇳 ❤️",
    "\u202bשלום עולם\u202c مرحبا بالعالم",
    "line one\r\nline two\r\n",
    "e\u0301 ≠ é, ﬁ, Å",
    "  indented\n\tand tabbed  ",
    "<|im_end|> </s> <s> [/INST] <|eot_id|>",
    "{{ 7 * 7 }} {% raw %} <a href='x'>&amp;</a>",
    "zero\u200bwidth\u00a0blank",
)
_WORDS = (
    "def",
    "return",
    "self",
    "the",
    "of",
    "a",
    "import",
    "is",
    "x",
    "=",
    "1",
    "+",
    "2",
    "(",
    ")",
    "\n",
    "எண்",
    "数",
)
ROLES = {
    "system": messages_pb2.ROLE_SYSTEM,
    "user": messages_pb2.ROLE_USER,
    "assistant": messages_pb2.ROLE_ASSISTANT,
    "tool": messages_pb2.ROLE_TOOL,
}


def text(draw: random.Random) -> str:
    """A few words, or something strange, or both."""
    words = " ".join(draw.choices(_WORDS, k=draw.randint(1, 12)))
    return draw.choice((words, words, draw.choice(STRANGE), words + draw.choice(STRANGE), draw.choice(STRANGE) + words))


def talk(seed: int, system: bool = True, tools: bool = True) -> datasets_pb2.Example:
    """A chat that ends with the assistant; with a system turn and with tools only where the caller can take them."""
    draw = random.Random(seed)
    made = datasets_pb2.Example(origin=datasets_pb2.Origin(file=f"part-{seed % 3}.jsonl", line=seed + 1))

    def say(role: str, content: str) -> messages_pb2.Message:
        message = made.chat.messages.add(role=ROLES[role])
        if content:
            message.parts.add(text=content)
        return message

    if system and draw.random() < 0.3:
        say("system", text(draw))
    with_tools = tools and draw.random() < 0.3
    if with_tools:
        made.chat.tools.add(name="look", description=text(draw), parameters_json='{"type": "object", "properties": {}}')
    for _ in range(draw.randint(1, 3)):
        say("user", text(draw))
        if with_tools and draw.random() < 0.6:
            call = say("assistant", "").tool_calls.add(id="call00001", name="look")
            call.arguments_json = '{"place": "சென்னை", "n": 1}'
            say("tool", text(draw)).tool_call_id = "call00001"
        say("assistant", text(draw))
    return made


def plain(example: datasets_pb2.Example) -> list[dict[str, Any]]:
    """Its turns as people write them, without tools."""
    names = {number: name for name, number in ROLES.items()}
    return [{"role": names[m.role], "content": "".join(p.text for p in m.parts)} for m in example.chat.messages]
