"""What a row is: conversation or text, with which system prompt and which metadata.

Law of this room: pure. A row that a step here does not know how to shape stays as it is.
"""

from __future__ import annotations

import fnmatch
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services.datasets.worker.plain import Plain, text_of
from services.datasets.worker.steps import api

_MODES = ("set", "replace", "remove")
_FIELDS = ("system", "prompt", "answer")


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """Sets, replaces or removes the system turn of conversations."""

    mode: str = api.parameter(
        "set", help="set where there is none, replace in every conversation, or remove", choices=_MODES
    )
    text: str = api.parameter("", help="the system prompt; empty for remove alone", maximum=100_000)

    def __post_init__(self) -> None:
        if (self.mode == "remove") != (not self.text):
            raise ValueError("a text with set and replace, none with remove")

    def apply(self, example: Plain) -> Plain:
        """Conversations, and the prompts of pairs that are conversations."""
        if "chat" in example:
            chat = self._within(example["chat"])
            return example if chat is example["chat"] else {**example, "chat": chat}
        told = example.get("preference", {})
        if not told or told.get("plain"):
            return example
        prompt = self._within(told.get("prompt", {}))
        same = prompt is told.get("prompt")
        return example if same else {**example, "preference": {**told, "prompt": prompt}}

    def _within(self, conversation: Plain) -> Plain:
        turns = conversation.get("messages", [])
        has = bool(turns) and turns[0].get("role") == "ROLE_SYSTEM"
        if self.mode == "remove":
            return {**conversation, "messages": turns[1:]} if has else conversation
        if has and (self.mode == "set" or text_of(turns[0]) == self.text):
            return conversation
        system = {"role": "ROLE_SYSTEM", "parts": [{"text": self.text}]}
        return {**conversation, "messages": [system, *turns[has:]]}


@dataclass(frozen=True, slots=True)
class AsText:
    """Makes prompt and completion of conversations with one question and one answer, by a template."""

    prompt: str = api.parameter(
        "{system}{prompt}\n\n", help="the prompt, with {system} (and an empty line, where there is one) and {prompt}",
        maximum=10_000,
    )  # fmt: skip
    completion: str = api.parameter("{answer}", help="the completion, with {answer}", minimum=1, maximum=10_000)
    plain: bool = api.parameter(False, help="everything is learnt: the prompt becomes part of the completion")

    def __post_init__(self) -> None:
        for name, template in (("prompt", self.prompt), ("completion", self.completion)):
            unknown = _unknown(template)
            if unknown:
                raise ValueError(f"{name} with {_braced(_FIELDS)} alone, not {unknown}")
        if "{answer}" not in self.completion or "{answer}" in self.prompt:
            raise ValueError("{answer} in completion, and not in prompt")

    def apply(self, example: Plain) -> Plain:
        """Conversations of several answers, with tools, and other rows stay."""
        asked = _asked(example)
        if asked is None:
            return example
        system, question, answer = asked
        told = {"system": system and system + "\n\n", "prompt": question, "answer": answer}
        prompt, completion = self.prompt.format(**told), self.completion.format(**told)
        if self.plain:
            prompt, completion = "", prompt + completion
        body = {k: v for k, v in (("prompt", prompt), ("completion", completion)) if v}
        return {**{k: v for k, v in example.items() if k != "chat"}, "completion": body}


@dataclass(frozen=True, slots=True)
class AsInstruction:
    """Makes a conversation of prompt and completion, or of plain text cut where a border stands first."""

    border: str = api.parameter(
        "", help="plain text is cut here: what is before asks, what is behind answers; empty = plain text stays",
        maximum=1000,
    )  # fmt: skip
    system: str = api.parameter("", help="a system prompt; empty = none", maximum=100_000)

    def apply(self, example: Plain) -> Plain:
        """Blanks around question and answer go; text without the border, or with nothing beside it, stays."""
        body = example.get("completion")
        if body is None:
            return example
        question, answer = body.get("prompt", ""), body.get("completion", "")
        if not question:
            question, _, answer = answer.partition(self.border) if self.border else ("", "", answer)
        question, answer = question.strip(), answer.strip()
        if not question or not answer:
            return example
        turns = [("ROLE_SYSTEM", self.system)] if self.system else []
        turns += [("ROLE_USER", question), ("ROLE_ASSISTANT", answer)]
        chat = {"messages": [{"role": role, "parts": [{"text": text}]} for role, text in turns]}
        return {**{k: v for k, v in example.items() if k != "completion"}, "chat": chat}


@dataclass(frozen=True, slots=True)
class Metadata:
    """Renames, keeps or drops metadata of rows, in this order; training does not see it."""

    rename: Mapping[str, str] = api.parameter({}, help="old key to new key", maximum=1000)
    keep: tuple[str, ...] = api.parameter((), help="patterns of keys that stay, as in id*; empty = all", maximum=1000)
    drop: tuple[str, ...] = api.parameter((), help="patterns of keys that go", maximum=1000)

    def __post_init__(self) -> None:
        if not (self.rename or self.keep or self.drop):
            raise ValueError("at least one of rename, keep and drop")
        if len(set(self.rename.values())) != len(self.rename):
            raise ValueError("rename to keys that all differ")

    def apply(self, example: Plain) -> Plain:
        """A key is not renamed to one that the row has already: nothing is overwritten."""
        before: dict[str, Any] = example.get("metadata", {})
        after = {}
        for key, value in before.items():
            name = self.rename.get(key, key)
            after[name if name not in before else key] = value
        if self.keep:
            after = {k: v for k, v in after.items() if any(fnmatch.fnmatchcase(k, p) for p in self.keep)}
        after = {k: v for k, v in after.items() if not any(fnmatch.fnmatchcase(k, p) for p in self.drop)}
        if after == before:
            return example
        rest = {k: v for k, v in example.items() if k != "metadata"}
        return {**rest, "metadata": after} if after else rest


def _unknown(template: str) -> str:
    """What a template names that there is not; a broken template names itself."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as e:
        return str(e)
    wrong = [n for _, n, form, how in fields if n is not None and (n not in _FIELDS or form or how)]
    return _braced(wrong)


def _braced(names: Iterable[str]) -> str:
    return ", ".join("{" + name + "}" for name in names)


def _asked(example: Plain) -> tuple[str, str, str] | None:
    """System prompt, question and answer of a conversation that has just these."""
    chat = example.get("chat", {})
    turns = list(chat.get("messages", ()))
    if chat.get("tools") or any(m.get("tool_calls") for m in turns):
        return None
    system = text_of(turns.pop(0)) if turns and turns[0].get("role") == "ROLE_SYSTEM" else ""
    if [m.get("role") for m in turns] != ["ROLE_USER", "ROLE_ASSISTANT"]:
        return None
    return system, text_of(turns[0]), text_of(turns[1])
