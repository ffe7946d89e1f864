"""Answers of several to one prompt: side by side as they grow on a terminal, one after another elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlorad._messages import Answer, Told
from qlorad.cli import output as out
from qlorad.cli.output import Format
from qlorad.cli.talk import closing_line, whole
from qlorad.v1 import inference_pb2

if TYPE_CHECKING:
    from qlorad.cli.live import SideBySide

_LAST = (inference_pb2.Finish, inference_pb2.Failure)


def show(voices: Sequence[str], told: Iterator[Told], output: Format) -> list[Answer]:
    """Shows what each says as it comes, and returns it. Does not raise for one that failed."""
    answers = [Answer() for _ in voices]
    with contextlib.closing(told):  # type: ignore[type-var]
        if output is Format.table and out.terminal(sys.stdout):
            from qlorad.cli import live

            with live.side_by_side(voices) as shown:
                _beside(answers, told, shown)
        else:
            _in_turn(voices, answers, told, output)
    if output is Format.json:
        out.emit_json({"answers": [_named(voice, a) for voice, a in zip(voices, answers, strict=True)]})
    return answers


def _beside(answers: list[Answer], told: Iterator[Told], shown: SideBySide) -> None:
    for index, event in told:
        answers[index].add(event)
        if isinstance(event, inference_pb2.Delta):
            shown.grow(index, event.text)
        elif isinstance(event, _LAST):
            shown.note(index, closing_line(answers[index]))


def _in_turn(voices: Sequence[str], answers: list[Answer], told: Iterator[Told], output: Format) -> None:
    """All answer at once; what is printed is the first that is not told yet, then the next."""
    ended: set[int] = set()
    at = printed = 0
    has_begun = False
    for index, event in told:
        if not has_begun:  # not before: a refusal has no heading
            _begin(output, voices[0])
            has_begun = True
        answers[index].add(event)
        if isinstance(event, _LAST):
            ended.add(index)
        while at < len(voices):
            if output is Format.table:
                print(answers[at].text[printed:], end="", flush=True)
                printed = len(answers[at].text)
            if at not in ended:
                break
            if output is Format.table:
                print(f"\n{closing_line(answers[at])}", flush=True)
            elif output is Format.jsonl:
                out.emit_json(_named(voices[at], answers[at]))
            at, printed = at + 1, 0
            if at < len(voices):
                _begin(output, voices[at])


def _begin(output: Format, voice: str) -> None:
    if output is Format.table:
        print(f"=== {voice}")


def _named(voice: str, answer: Answer) -> dict[str, Any]:
    return {"adapter": voice, **whole(answer)}
