"""Presets: a task in words, laid over a conversation.

Law of this room: pure. A preset changes what the model is told and how it
chooses, where the request says nothing; it changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf import json_format

from qlorad.v1 import inference_pb2, messages_pb2
from services.common import generation, names
from services.common.errors import Violation, show

INPUT = "{input}"
MAX_DESCRIPTION = 1000
MAX_WORDS = 1 << 16


def check(preset: inference_pb2.Preset, field: str = "preset") -> list[Violation]:
    """Violations of a preset that someone wants to keep; none if it is fine."""
    rest = preset.name.removeprefix("presets/")
    wrong: list[Violation] = []
    if rest == preset.name or not names.is_alias(rest):
        wrong.append(Violation(f"{field}.name", show(preset.name), f"'presets/ID'; ID is {names.ALIAS_RULE}"))
    for name, text, most in (
        ("description", preset.description, MAX_DESCRIPTION),
        ("system", preset.system, MAX_WORDS),
        ("template", preset.template, MAX_WORDS),
    ):
        if len(text) > most:
            wrong.append(Violation(f"{field}.{name}", f"{len(text)} characters", f"at most {most} characters"))
    if preset.template.count(INPUT) != 1:
        given = f"{preset.template.count(INPUT)} times {INPUT}" if preset.template else "nothing"
        wrong.append(Violation(f"{field}.template", given, f"a text with {INPUT} once, where the caller's text goes"))
    if preset.is_shipped:
        wrong.append(Violation(f"{field}.is_shipped", "true", "nothing: what callers keep is theirs"))
    return wrong + generation.check(preset.options, prefix=f"{field}.options")


def asks(conversation: messages_pb2.Conversation) -> bool:
    """Whether there is a user's turn that a preset can put into its words."""
    return any(turn.role == messages_pb2.ROLE_USER for turn in conversation.messages)


def applied(preset: inference_pb2.Preset, conversation: messages_pb2.Conversation) -> messages_pb2.Conversation:
    """The conversation in the preset's words; the one that was given is left alone.

    The caller's text is put in as it is: {input} in it means nothing.
    """
    worded = messages_pb2.Conversation()
    worded.CopyFrom(conversation)
    last = [turn for turn in worded.messages if turn.role == messages_pb2.ROLE_USER][-1]
    before, _, after = preset.template.partition(INPUT)
    text = "".join(part.text for part in last.parts)
    del last.parts[:]
    last.parts.add(text=f"{before}{text}{after}")
    if preset.system and worded.messages[0].role != messages_pb2.ROLE_SYSTEM:
        turns = list(worded.messages)
        del worded.messages[:]
        worded.messages.add(role=messages_pb2.ROLE_SYSTEM).parts.add(text=preset.system)
        worded.messages.extend(turns)
    return worded


def read_shipped(trees: Mapping[str, object]) -> dict[str, inference_pb2.Preset]:
    """Shipped presets by full name, from the plain values of their files; ValueError says what is wrong."""
    found = {}
    for name, tree in sorted(trees.items()):
        if not isinstance(tree, Mapping):
            raise ValueError(f"preset {name}: must be a mapping with description, system, template and options")
        try:
            preset = json_format.ParseDict(dict(tree), inference_pb2.Preset())
        except json_format.ParseError as e:
            raise ValueError(f"preset {name}: {e}") from None
        preset.name = f"presets/{name}"
        wrong = check(preset, name)
        if wrong:
            raise ValueError(f"preset {name}: " + "; ".join(map(str, wrong)))
        preset.is_shipped = True
        found[preset.name] = preset
    return found


def listed(
    presets: Mapping[str, inference_pb2.Preset], position: str, size: int
) -> tuple[list[inference_pb2.Preset], str]:
    """A page after a position, and the position of the next one; empty = that was all."""
    ordered = sorted(presets.values(), key=_place)
    rest = [p for p in ordered if not position or _position(p) > position]
    page = rest[:size]
    return page, _position(page[-1]) if len(rest) > size else ""


def _place(preset: inference_pb2.Preset) -> tuple[bool, str]:
    return (not preset.is_shipped, preset.name)


def _position(preset: inference_pb2.Preset) -> str:
    return f"{int(not preset.is_shipped)}{preset.name}"
