"""Preference rows: two answers to one prompt, in the ways that common files have them.

Law of this room: pure. Texts stay texts, without roles. Where both answers are
whole conversations, the turns that they begin with alike are the prompt; a
prompt that is told as well must be among them.
"""

from __future__ import annotations

import re
from typing import Any

from services.datasets.forms import is_messages
from services.datasets.worker import chat, sharegpt
from services.datasets.worker.found import INFO, Problem
from services.datasets.worker.plain import Plain, text_of
from services.datasets.worker.row import Row

_ANSWERS = "texts, or lists of messages"
# How texts of whole dialogues mark their speakers (HH-RLHF).
_MARK = re.compile(r"\n\n(Human|Assistant):")
_MARKED = {"Human": "user", "Assistant": "assistant"}


def preference(row: Row) -> Plain:
    """The preference of a row."""
    prompt = _prompt(row)
    system = row.text("system", needed=False)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    into: Plain = {}
    if isinstance(chosen, str) and isinstance(rejected, str):
        marked = (_dialogue(chosen), _dialogue(rejected)) if prompt is None else (None, None)
        if marked[0] is not None and marked[1] is not None:
            told = "texts of whole dialogues, by their marks Human: and Assistant:"
            row.problems.append(Problem("marked_dialogue", told, "they were read as messages", "chosen", INFO))
            chosen, rejected = marked[0], marked[1]
        elif isinstance(prompt, list):
            chosen, rejected = _one_turn(chosen), _one_turn(rejected)
        else:
            _texts(row, prompt, system, chosen, rejected, into)
            chat.tools(row, into.setdefault("prompt", {}))
            return _tidy(into)
    if isinstance(chosen, str) and isinstance(rejected, list):
        chosen = _one_turn(chosen)
    if isinstance(rejected, str) and isinstance(chosen, list):
        rejected = _one_turn(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        _turns(row, prompt, system, chosen, rejected, into)
    chat.tools(row, into.setdefault("prompt", {}))
    return _tidy(into)


def _prompt(row: Row) -> str | list[Any] | None:
    """What the row tells as its prompt; None for nothing. Also under the names "question" and "conversations"."""
    for name in (row.named("prompt"), "question", "conversations"):
        value = row.given.get(name)
        if value is None or (name != row.named("prompt") and name not in row.rest):
            continue
        del row.rest[name]
        if isinstance(value, str) and not is_messages(value):
            return value
        return row.listed(value, name, _ANSWERS) or []
    row.rest.pop(row.named("prompt"), None)
    return None


def _answer(row: Row, field: str) -> str | list[Any] | None:
    column = row.named(field)
    value = row.take(field)
    if value is None:
        row.missing(column, _ANSWERS)
        return None
    if isinstance(value, str) and not is_messages(value):
        return value
    return row.listed([value] if isinstance(value, dict) else value, column, _ANSWERS)


def _one_turn(text: str) -> list[Any]:
    return [{"role": "assistant", "content": text}]


def _dialogue(text: str) -> list[Any] | None:
    """The messages of a text with marks; None where it does not begin with one."""
    pieces = _MARK.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if pieces[0] or len(pieces) < 3:
        return None
    return [
        {"role": _MARKED[who], "content": said.removeprefix(" ")}
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _texts(row: Row, prompt: str | None, system: str, chosen: str, rejected: str, into: Plain) -> None:
    if prompt is None:
        row.missing(row.named("prompt"), "the prompt, or answers that are whole conversations")
        return
    asked: list[Plain] = [{"role": "ROLE_SYSTEM", "parts": [{"text": system}]}] if system else []
    asked.append({"role": "ROLE_USER", **_parts(prompt)})
    into["prompt"] = {"messages": asked}
    into["chosen"] = [{"role": "ROLE_ASSISTANT", **_parts(chosen)}]
    into["rejected"] = [{"role": "ROLE_ASSISTANT", **_parts(rejected)}]
    if not system:
        into["plain"] = True


def _parts(text: str) -> Plain:
    return {"parts": [{"text": text}]} if text else {}


def _turns(
    row: Row, prompt: str | list[Any] | None, system: str, chosen: list[Any], rejected: list[Any], into: Plain
) -> None:
    if isinstance(prompt, list):
        asked = prompt
        if asked and chosen[: len(asked)] == asked == rejected[: len(asked)]:
            chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
    else:
        common = _common(chosen, rejected)
        asked, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    asked_turns = _read(asked, "prompt", row, system)
    if isinstance(prompt, str):
        if not asked:
            asked_turns.append({"role": "ROLE_USER", **_parts(prompt)})
        elif prompt.strip() not in [text_of(m).strip() for m in asked_turns]:
            told = "is no turn of what both conversations begin with"
            row.wrong("prompt_differs", told, "the prompt as it stands in both, or none", row.named("prompt"))
    if asked_turns:
        into["prompt"] = {"messages": asked_turns}
    into["chosen"] = _read(chosen, "chosen", row)
    into["rejected"] = _read(rejected, "rejected", row)


def _common(chosen: list[Any], rejected: list[Any]) -> int:
    """How many turns both begin with alike; the last turn of either is always an answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(max(0, most)) if chosen[i] != rejected[i]), max(0, most))


def _read(values: list[Any], path: str, row: Row, system: str = "") -> list[Plain]:
    if any(isinstance(v, dict) and "from" in v and "role" not in v for v in values):
        return sharegpt.turns(values, path, row.named(path), row, system)
    made: list[Plain] = [{"role": "ROLE_SYSTEM", "parts": [{"text": system}]}] if system else []
    return made + chat.messages(values, path, row)


def _tidy(into: Plain) -> Plain:
    return {k: v for k, v in into.items() if v}
