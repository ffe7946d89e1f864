"""What a command prints: tables for people, JSON for programs.

Law of this room: stdout carries the answer and nothing else: one JSON document
a call with `-o json`, one a line with `-o jsonl`; all other words go to stderr.
Keys are proto field names; numbers are numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

    from qlorad.errors import QloradError

_EXACT = 1 << 53


class Format(StrEnum):
    """How to print."""

    table = "table"
    json = "json"
    jsonl = "jsonl"


Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the answer.")]
Column = tuple[str, Callable[[Any], str]]


def asked_for(argv: Sequence[str]) -> Format:
    """The format that the words of a command line ask for, also where they are wrong otherwise."""
    for here, following in zip(argv, [*argv, ""][1:], strict=True):
        for flag in ("-o", "--output"):
            value = following if here == flag else here.removeprefix(flag).removeprefix("=")
            if here.startswith(flag) and value in Format.__members__:
                return Format(value)
    return Format.table


def terminal(stream: Any) -> bool:
    """Whether a person looks at the stream."""
    return bool(getattr(stream, "isatty", lambda: False)())


def unicode_ok(stream: Any) -> bool:
    """Whether the stream can show more than ASCII."""
    return (getattr(stream, "encoding", "") or "").lower().replace("-", "") == "utf8"


def say(text: str) -> None:
    """A word to the person, beside the answer."""
    print(text, file=sys.stderr, flush=True)


def emit_json(value: object) -> None:
    """One JSON document on a line of its own."""
    print(json.dumps(value, ensure_ascii=not unicode_ok(sys.stdout)), flush=True)


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain data: proto field names, absent scalars as their zero, 64-bit numbers as numbers."""
    from google.protobuf import json_format

    told = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _numbers(told, message.DESCRIPTOR)  # type: ignore[arg-type]


def one(output: Format, message: Message, rows: Iterable[tuple[str, str]]) -> None:
    """A single thing: its JSON, or its fields under one another."""
    if output is not Format.table:
        emit_json(as_dict(message))
        return
    shown = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def many(output: Format, key: str, messages: Iterable[Message], columns: Sequence[Column], empty: str = "") -> None:
    """Several things: one document under `key`, or a line each, or a table."""
    if output is Format.jsonl:
        for message in messages:
            emit_json(as_dict(message))
    elif output is Format.json:
        emit_json({key: [as_dict(m) for m in messages]})
    else:
        table([title for title, _ in columns], [[cell(m) for _, cell in columns] for m in messages], empty)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "") -> None:
    """Aligned columns; on a terminal with a quiet frame."""
    if not rows:
        say(empty or "nothing there")
        return
    if terminal(sys.stdout):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for number, title in enumerate(titles):
            shown.add_column(title, overflow="fold", no_wrap=number == 0)
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))
        Console().print(shown)
        return
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def emit_error(output: Format, error: QloradError) -> None:
    """A failure: a document on stdout for programs, text on stderr for people."""
    if output is not Format.table:
        emit_json({"error": error.as_dict()})
        return
    if len(error.violations) > 1:
        _say_each(error)
    else:
        say(f"qlorad: {error.message}")
    for blocker in error.blockers:
        if blocker.description not in error.message:
            say(f"  {blocker.subject}: {blocker.description}")
    if error.retry_after:
        say(f"  try again in {error.retry_after:g} s")


def _say_each(error: QloradError) -> None:
    """A head, and a line for each violation; the message would tell the same in one."""
    head, _, rest = error.message.partition(f"{error.violations[0].field}: ")
    if not rest:
        say(f"qlorad: {error.message}")
    else:
        say(f"qlorad: {head.rstrip(': ') or 'these things are wrong'}:")
    given = not rest or rest.startswith("got ")
    for violation in error.violations:
        # What is wrong with a row is a sentence, which nobody gave.
        told = violation.description if given else violation.description.removeprefix("got ")
        say(f"  {violation.field}: {told}")


def freed(output: Format, count: int) -> None:
    """What a removal gave back."""
    if output is not Format.table:
        emit_json({"freed_bytes": count})
    else:
        print(f"freed {size(count)}")


def short(digest: str) -> str:
    """A digest as people read it."""
    return digest[:19]


def bare(name: str) -> str:
    """A name without its collection; a digest that stands for a name is cut."""
    rest = name.partition("/")[2] or name
    return short(rest) if rest.startswith("sha256:") else rest


def size(count: int) -> str:
    """Bytes as people read them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return ""


def count(number: int) -> str:
    """A number of weights as people read it."""
    for step, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if number >= step:
            return f"{number / step:.1f}{unit}"
    return str(number)


def when(stamp: Any) -> str:
    """A timestamp in local time; empty where there is none."""
    if not stamp.seconds:
        return ""
    return f"{stamp.ToDatetime(tzinfo=_utc()).astimezone():%Y-%m-%d %H:%M:%S}"


def word(enum: Any, prefix: str, value: int) -> str:
    """A value of an enum without its prefix."""
    return str(enum.Name(value)).removeprefix(prefix)


def _utc() -> Any:
    from datetime import UTC

    return UTC


def _numbers(told: dict[str, Any], descriptor: Descriptor) -> dict[str, Any]:
    """64-bit integers, which ProtoJSON writes as strings, as numbers where every reader holds them exactly."""
    for field in descriptor.fields:
        if field.name in told:
            told[field.name] = _field(told[field.name], field)
    return told


def _field(value: Any, field: FieldDescriptor) -> Any:
    kind = field.message_type
    if kind is None:
        if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            return [_number(v) for v in value] if isinstance(value, list) else _number(value)
        return value
    if kind.full_name.startswith("google.protobuf."):
        return value
    if kind.GetOptions().map_entry:
        return {key: _field(item, kind.fields_by_name["value"]) for key, item in value.items()}
    return [_numbers(v, kind) for v in value] if isinstance(value, list) else _numbers(value, kind)


def _number(text: Any) -> Any:
    number = int(text)
    return number if -_EXACT <= number <= _EXACT else text
