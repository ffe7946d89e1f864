"""`qlorad generate --file`: a file of prompts, answered as batches, told in the order of the file.

A line is a text, or an object with "prompt" or "messages", and any of "adapter",
"model", "options" and "id"; what a line leaves out, the command line says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlorad import errors
from qlorad._messages import Answer, batch_item, conversation, message
from qlorad.cli import output as out
from qlorad.cli import resident
from qlorad.cli.output import Format
from qlorad.cli.talk import whole
from qlorad.v1 import inference_pb2

if TYPE_CHECKING:
    from qlorad.client import Client

MAX_BATCH = 256
_KEYS = ("prompt", "messages", "adapter", "model", "options", "id")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says for lines that do not."""

    adapter: str
    model: str
    raw: bool
    system: str
    how: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt, and the id that its answer carries back."""

    item: inference_pb2.BatchItem
    ident: Any = None


def read(text: str, asked: Asked) -> list[Line]:
    """Every line as a prompt; InvalidArgument with every line that is none."""
    lines: list[Line] = []
    wrong: list[errors.Violation] = []
    for number, told in enumerate(text.splitlines(), start=1):
        if not told.strip():
            continue
        try:
            lines.append(_line(json.loads(told), asked))
        except ValueError as e:
            wrong.append(errors.Violation(f"line {number}", f"got {told[:60]!r}; accepted: JSON ({e})"))
        except errors.InvalidArgument as e:
            wrong += [errors.Violation(f"line {number}", f"{v.field}: {v.description}") for v in e.violations]
    if not lines and not wrong:
        wrong.append(errors.Violation("--file", "got no prompt; accepted: a line of JSON for each"))
    if wrong:
        told = "; ".join(f"{v.field}: {v.description}" for v in wrong)
        raise errors.InvalidArgument(told, reason="INVALID_REQUEST", violations=wrong)
    return lines


def _line(given: Any, asked: Asked) -> Line:
    told = {"prompt": given} if isinstance(given, str) else given
    if not isinstance(told, dict) or set(told) - set(_KEYS):
        raise errors.invalid("line", given, f"a text, or an object with any of {', '.join(_KEYS)}")
    options = told.get("options") or {}
    if not isinstance(options, dict):
        raise errors.invalid("options", options, "an object")
    whole = {
        "adapter": told.get("adapter") or asked.adapter,
        "model": told.get("model") or asked.model,
        "options": {**asked.how, **options},
    }
    if "messages" in told:
        if not isinstance(told["messages"], list) or not all(isinstance(turn, dict) for turn in told["messages"]):
            raise errors.invalid("messages", told["messages"], "a list of {'role', 'content'}")
        whole["messages"] = told["messages"]
    if "prompt" in told:
        if asked.raw or "messages" in told or not isinstance(told["prompt"], str):
            whole["prompt"] = told["prompt"]
        else:
            system = [message("system", asked.system)] if asked.system else []
            whole["messages"] = conversation([*system, message("user", told["prompt"])])
    return Line(batch_item(whole), told.get("id"))


def run(client: Client, lines: Sequence[Line], priority: int, output: Format) -> int:
    """Answers every line and prints each in its place; 1 if one failed."""
    _ready(client, lines)
    answers, failed = [], 0
    for number, answer in enumerate(_answers(client, [line.item for line in lines], priority)):
        told = {"index": number, **({"id": lines[number].ident} if lines[number].ident is not None else {})}
        told |= whole(answer)
        failed += answer.failed is not None
        if output is Format.json:
            answers.append(told)
        else:
            out.emit_json(told)
    if output is Format.json:
        out.emit_json({"answers": answers})
    if failed:
        out.say(f"qlorad: {failed} of {len(lines)} failed; their lines hold the error")
    return 1 if failed else 0


def _ready(client: Client, lines: Sequence[Line]) -> None:
    """Loads what the lines name. An adapter that does not come is told of, and its lines fail alone."""
    for name in dict.fromkeys(line.item.model for line in lines if line.item.model):
        resident.model(client, name)
    # Adapters first: they bring their bases, which "base" may mean.
    for name in sorted(dict.fromkeys(line.item.adapter for line in lines), key=("", "base").__contains__):
        try:
            resident.ready(client, "", [name])
        except errors.Unavailable:
            raise
        except errors.QloradError as e:
            if name in ("", "base"):
                raise
            out.say(f"qlorad: {e.message}")


def _answers(client: Client, items: Sequence[inference_pb2.BatchItem], priority: int) -> Iterator[Answer]:
    """Answers in the order of the prompts, each as soon as it and those before it have ended."""
    for begin in range(0, len(items), MAX_BATCH):
        part = items[begin : begin + MAX_BATCH]
        waiting = {index: Answer() for index in range(len(part))}
        ended: set[int] = set()
        following = 0
        for index, event in client.inference.generate_batch(part, priority=priority):
            waiting[index].add(event)
            if isinstance(event, inference_pb2.Finish | inference_pb2.Failure):
                ended.add(index)
            while following in ended:
                yield waiting.pop(following)
                following += 1
