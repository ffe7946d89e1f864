"""What an author of steps may import; it stays what it is within a major version.

Law of this room: names and functions only, no state. A step is a frozen
dataclass whose fields are declared with `parameter` and that has a method
`apply(example) -> example | None`; its docstring's first line is what ListSteps
tells. It sees one row at a time and keeps nothing between rows. `apply` returns
the very example where it changes nothing, another one where it changes
something, and None where it leaves the row out. An example is the canonical JSON
of qlorad.v1.Example as data: dicts, lists, texts, numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from services.common.parameters import parameter
from services.datasets.worker.plain import Plain, body_of, text_of, texts

__all__ = [
    "ALL",
    "ANSWERS",
    "PROMPTS",
    "WHERE",
    "Plain",
    "Step",
    "answers",
    "body_of",
    "map_messages",
    "map_texts",
    "parameter",
    "text_of",
    "texts",
    "where",
]

ALL, PROMPTS, ANSWERS = "all", "prompts", "answers"
WHERE = (ALL, PROMPTS, ANSWERS)
Change: TypeAlias = Callable[[str], str]


class Step(Protocol):
    """What a step is, beside being a frozen dataclass."""

    def apply(self, example: Plain) -> Plain | None:
        """The row behind the step; None leaves it out."""


def where(default: str = ALL) -> Any:
    """A parameter that says which texts a step works on; hand it to map_texts."""
    told = "which texts: all, prompts (what is not learnt), or answers (what is learnt)"
    return parameter(default, help=told, choices=WHERE)


def map_texts(example: Plain, change: Change, where: str = ALL, infill: bool = True) -> Plain:
    """The example with every text changed; the very example where none was.

    Prompts are what is not learnt, answers what is (of a preference pair: both).
    Arguments of tool calls and metadata are not touched; a text that becomes
    empty is left out, its turn stays. With `infill` false, code with a gap is
    returned as it is.
    """
    if "completion" in example:
        return _fields(example, "completion", change, where, {"prompt": PROMPTS, "completion": ANSWERS})
    if "infill" in example:
        kinds = {"prefix": PROMPTS, "middle": ANSWERS, "suffix": PROMPTS}
        return _fields(example, "infill", change, where, kinds) if infill else example

    def turn(message: Plain, answer: bool) -> Plain:
        return message if where not in (ALL, ANSWERS if answer else PROMPTS) else _message(message, change)

    return map_messages(example, turn)


def map_messages(example: Plain, change: Callable[[Plain, bool], Plain]) -> Plain:
    """The example with every turn of its conversations changed; the very example where none was.

    `change` gets the turn, and whether it is learnt; it returns the very turn
    where it changes nothing.
    """
    if "chat" in example:
        turns = example["chat"].get("messages", [])
        changed = _turns(turns, lambda m: change(m, m.get("role") == "ROLE_ASSISTANT"))
        return example if changed is turns else {**example, "chat": {**example["chat"], "messages": changed}}
    if "preference" not in example:
        return example
    told = example["preference"]
    prompt = told.get("prompt", {})
    fresh = {
        "messages": _turns(prompt.get("messages", []), lambda m: change(m, False)),
        "chosen": _turns(told.get("chosen", []), lambda m: change(m, m.get("role") == "ROLE_ASSISTANT")),
        "rejected": _turns(told.get("rejected", []), lambda m: change(m, m.get("role") == "ROLE_ASSISTANT")),
    }
    body = dict(told)
    if fresh["messages"] is not prompt.get("messages", fresh["messages"]):
        body["prompt"] = {**prompt, "messages": fresh["messages"]}
    for side in ("chosen", "rejected"):
        if side in told and fresh[side] is not told[side]:
            body[side] = fresh[side]
    same = all(body.get(k) is told.get(k) for k in body)
    return example if same else {**example, "preference": body}


def answers(example: Plain) -> list[str]:
    """The texts that are learnt; of a preference pair the chosen ones."""
    if "completion" in example:
        return [example["completion"].get("completion", "")]
    if "infill" in example:
        return [example["infill"].get("middle", "")]
    turns = example.get("chat", {}).get("messages", ()) or example.get("preference", {}).get("chosen", ())
    return [text_of(m) for m in turns if m.get("role") == "ROLE_ASSISTANT"]


def _turns(turns: Sequence[Plain], change: Callable[[Plain], Plain]) -> Sequence[Plain]:
    changed = [change(m) for m in turns]
    return turns if all(a is b for a, b in zip(turns, changed, strict=True)) else changed


def _message(message: Plain, change: Change) -> Plain:
    parts = message.get("parts")
    if not parts:
        return message
    changed = [change(p["text"]) for p in parts]
    if all(text == p["text"] for text, p in zip(changed, parts, strict=True)):
        return message
    left = [{"text": text} for text in changed if text]
    rest = {k: v for k, v in message.items() if k != "parts"}
    return {**rest, "parts": left} if left else rest


def _fields(example: Plain, body: str, change: Change, where: str, kinds: dict[str, str]) -> Plain:
    told = example[body]
    changed = {k: change(v) if where in (ALL, kinds[k]) else v for k, v in told.items()}
    if changed == told:
        return example
    return {**example, body: {k: v for k, v in changed.items() if v}}
