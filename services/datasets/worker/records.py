"""From the bytes of one file to records: JSONL, a JSON array, CSV or TSV.

Law of this room: memory is bounded by one row, whatever the file; a row that
cannot be read is a record with a problem, and a file that cannot be read on is
Unreadable. Nothing here knows what a row means.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from services.datasets.worker.found import INFO, Problem, Record, Unreadable, clip
from services.datasets.worker.jsonl import JsonLines, broken_json, record_of
from services.datasets.worker.limits import MAX_ROW_BYTES, not_utf8, too_long
from services.datasets.worker.strict_json import StrictJson, odd_text, too_deep

_CHUNK = 1 << 20
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_MAGIC = (
    (b"PK\x03\x04", "a zip archive (or a document made of one)"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "Parquet"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "a SQLite database"),
    *((bytes([0x80, n]), "a Python pickle, which is never read") for n in range(2, 6)),
)


def container_of(filename: str, head: bytes) -> str:
    """How rows lie in a file ("jsonl", "json", "csv", "tsv"), from its first bytes and its name.

    Unreadable where the bytes are no text that this reads.
    """
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise Unreadable(Problem("not_text", f"the file is {what}", "send JSONL, JSON, CSV or TSV as UTF-8 text"))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Unreadable(Problem("not_utf8", "the file is UTF-16", "save it as UTF-8"))
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise Unreadable(Problem("empty_file", "the file holds no row", "send a file with rows"))
    kind = filename.lower().rpartition(".")[2]
    if kind in ("csv", "tsv"):
        return kind
    return "json" if text.startswith(b"[") else "jsonl"


def open_records(f: BinaryIO, filename: str) -> tuple[str, list[Problem], Iterator[Record]]:
    """How rows lie in the file, what is worth saying of it, and its records."""
    head = f.read(4096)
    while head and not head.removeprefix(codecs.BOM_UTF8).strip():  # blank so far
        more = f.read(4096)
        if not more:
            break
        head = head[:3] + more
    container = container_of(filename, head)
    has_bom = head.startswith(codecs.BOM_UTF8)
    f.seek(len(codecs.BOM_UTF8) if has_bom else 0)
    said = []
    if has_bom:
        said.append(Problem("byte_order_mark", "the file begins with a byte order mark", "it was left out", "", INFO))
    read: Mapping[str, Callable[[Any], Iterator[Record]]] = {
        "jsonl": JsonLines,
        "json": elements,
        "csv": lambda f: table(f, ","),
        "tsv": lambda f: table(f, "\t"),
    }
    return container, said, read[container](f)


def lines(f: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one above the limit, which is never held whole."""
    number = 0
    while line := f.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            _skip_line(f)
            yield number, None
        else:
            yield number, line


def _skip_line(f: BinaryIO) -> None:
    while (rest := f.readline(_CHUNK)) and not rest.endswith(b"\n"):
        pass


class _Text:
    """A window of decoded text on a file; holds one element at a time."""

    def __init__(self, f: BinaryIO) -> None:
        self._file = f
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> bool:
        """Reads on, dropping what lies behind; False at the end of the file."""
        if self.ended:
            return False
        data = self._file.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.text = self.text[self.at :] + self._decode.decode(data, final=self.ended)
        self.at = 0
        return True

    def next(self) -> str:
        """The next character that is not a blank, not taken; "" at the end."""
        while True:
            found = _NOT_SPACE.search(self.text, self.at)
            if found is not None:
                self.at = found.start()
                return found[0]
            self.at = len(self.text)
            if not self.more():
                return ""


def elements(f: BinaryIO) -> Iterator[Record]:
    """The objects of one JSON array, numbered from one."""
    window, strict, number = _Text(f), StrictJson(), 1
    try:
        if window.next() != "[":
            raise Unreadable(Problem("broken_json", "not a JSON array", "begin with '['"))
        window.at += 1
        if window.next() == "]":
            raise Unreadable(Problem("empty_file", "the array holds no row", "send a file with rows"))
        while True:
            window.next()
            yield _element(window, strict, number)
            mark = window.next()
            window.at += 1
            if mark == "]":
                break
            if mark != ",":
                raise Unreadable(_lost(f"{clip(mark) if mark else 'the end'} stands where ',' or ']' should"), number)
            number += 1
        if window.next():
            raise Unreadable(_lost("something follows the array"), number)
    except UnicodeDecodeError as e:
        raise Unreadable(not_utf8(e), number) from None


def _lost(told: str) -> Problem:
    return Problem("broken_json", f"not JSON: {told}", "mend the array; nothing behind this place can be read")


def _is_inside(error: ValueError, end: int) -> bool:
    """Whether the text is broken whatever follows: the fault lies well before the window's edge."""
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string"):
        return False
    return error.pos < end - 16


def _element(window: _Text, strict: StrictJson, number: int) -> Record:
    while True:
        try:
            value, end, problem = strict.decode(window.text, window.at)
            if end < len(window.text) or window.ended:
                break
        except RecursionError:
            raise Unreadable(too_deep(), number) from None
        except ValueError as e:
            # Broken, or only cut by the window's edge?
            if window.ended or _is_inside(e, len(window.text)):
                raise Unreadable(
                    broken_json(e, "mend the array; nothing behind this place can be read"), number
                ) from None
        if len(window.text) - window.at > MAX_ROW_BYTES:
            raise Unreadable(too_long("element"), number)
        window.more()
    if end - window.at > MAX_ROW_BYTES:
        problem = too_long("element")
    window.at = end
    return record_of(number, value, problem)


class _TooLong(Exception):
    """A single line above the limit."""


class _RowLines:
    """Text lines for csv, with a bound on what one row may take. Can be read on after it raised."""

    def __init__(self, f: BinaryIO) -> None:
        self._lines = lines(f)
        self.number = 0
        self.taken = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if line is None:
            raise _TooLong
        self.taken += len(line)
        if self.taken > MAX_ROW_BYTES:
            hint = "close the quote; nothing behind this place can be read"
            raise Unreadable(Problem("line_too_long", "a quote is left open, or a row is too long", hint), self.number)
        return line.decode()


def table(f: BinaryIO, delimiter: str) -> Iterator[Record]:
    """CSV with a header; every row must have as many fields as the header."""
    csv.field_size_limit(MAX_ROW_BYTES)
    source = _RowLines(f)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        begin, source.taken = source.number + 1, 0
        problem = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            break
        except UnicodeDecodeError as e:
            problem = not_utf8(e)
        except _TooLong:
            problem = too_long()
        except csv.Error as e:
            problem = Problem("broken_csv", f"not CSV: {e}", 'quote fields with ", and write " in them as ""')
        if problem is None and not fields:
            continue
        if header is None:
            header = _header(fields, problem, begin)
            continue
        if problem is None and len(fields) != len(header):
            told = f"{len(fields)} fields under a header of {len(header)}"
            problem = Problem("ragged_row", told, f"give every row {len(header)} fields; quote those that hold commas")
        row = dict(zip(header, fields, strict=False))
        if problem is None and any("\x00" in field for field in fields):
            problem = odd_text(row)
        yield Record(begin, row, None) if problem is None else Record(begin, None, problem, row)
    if header is None:
        raise Unreadable(Problem("empty_file", "the file holds no row", "send a header and rows"))


def _header(fields: list[str], problem: Problem | None, line: int) -> list[str]:
    if problem is None and any(not name.strip() or "\x00" in name for name in fields):
        problem = Problem("bad_header", "a column has no usable name", "name every column in the first line")
    if problem is None and len(set(fields)) != len(fields):
        twin = next(n for i, n in enumerate(fields) if n in fields[:i])
        problem = Problem("bad_header", f"the column {clip(twin)} stands twice", "give every column its own name")
    if problem is not None:
        raise Unreadable(problem, line)
    return fields
