"""Rows on their way: canonical lines in one file, what is known of each in another.

Law of this room: rows are appended once, in order of file and line, and read in
blocks; memory does not grow with them. Nothing here knows what a row means.
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_ENTRY = struct.Struct("<16sQQIIIIHBB")
ENTRY = np.dtype(
    [
        ("content", "<u8", 2),
        ("line", "<u8"),
        ("row", "<u8"),
        ("size", "<u4"),
        ("characters", "<u4"),
        ("words", "<u4"),
        ("stratum", "<u4"),
        ("file", "<u2"),
        ("side", "u1"),
        ("form", "u1"),
    ]
)
"""What is known of a row; `size` counts its newline."""
MAX_FILES = 1 << 16
_BOUND = struct.Struct("<QQ")
_FLUSH_BYTES = 1 << 19
_BLOCK_ROWS = 1 << 16
_BLOCK_BYTES = 4 << 20

Array = npt.NDArray[Any]


class Segment:
    """Rows of one stretch of one file, being written."""

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        self.rows = 0
        self._folder, self._number = folder, number
        self._lines: list[bytes] = []
        self._entries: list[bytes] = []
        self._bound: list[bytes] = []
        self._bytes = 0
        self._lines_file = rows_path(folder, number).open("wb", buffering=0)
        self._entries_file = entries_path(folder, number).open("wb", buffering=0)

    def add(
        self,
        line: bytes,
        content: bytes,
        at: int,
        row: int,
        size: tuple[int, int],
        file: int,
        stratum: int,
        side: int,
        form: int,
    ) -> None:
        """Appends a row: its line without newline, and where it came from; `size` is characters and words."""
        self._lines.append(line)
        self._entries.append(_ENTRY.pack(content, at, row, len(line) + 1, *size, stratum, file, side, form))
        self.rows += 1
        self._bytes += len(line)
        if self._bytes > _FLUSH_BYTES:
            self._flush()

    def bind(self, key: int) -> None:
        """Says of the row that was added last that it belongs to all others of this key."""
        self._bound.append(_BOUND.pack(self.rows - 1, key))

    def add_all(self, rows: Sequence[Any], at: int, row: int, file: int, side: int, form: int) -> None:
        """Appends rows of lines that follow one another: (line, content, characters, words) of each."""
        lines, contents, characters, words = zip(*rows, strict=True)
        entries = np.zeros(len(rows), ENTRY)
        entries["content"] = np.frombuffer(b"".join(contents), "<u8").reshape(-1, 2)
        entries["line"] = np.arange(at, at + len(rows))
        entries["row"] = np.arange(row, row + len(rows))
        entries["size"] = sizes = np.fromiter(map(len, lines), np.int64, len(rows)) + 1
        entries["characters"], entries["words"] = characters, words
        entries["file"], entries["side"], entries["form"] = file, side, form
        self._lines += lines
        self._entries.append(entries.tobytes())
        self.rows += len(rows)
        self._bytes += int(sizes.sum())
        if self._bytes > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            self._lines.append(b"")
            _write_all(self._lines_file.fileno(), b"\n".join(self._lines))
            _write_all(self._entries_file.fileno(), b"".join(self._entries))
            self._lines, self._entries, self._bytes = [], [], 0
        if self._bound:
            with _bound_path(self._folder, self._number).open("ab") as f:
                f.write(b"".join(self._bound))
            self._bound = []

    def close(self) -> None:
        """Ends the segment."""
        try:
            self._flush()
        finally:
            self._lines_file.close()
            self._entries_file.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _bound_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where it lies which rows of a segment belong to others; there only where some do."""
    return folder / f"{number:06d}.bound"


def rows_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the lines of a segment lie."""
    return folder / f"{number:06d}.rows"


def entries_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the entries of a segment lie."""
    return folder / f"{number:06d}.entries"


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows in order: the first one's place, their entries, and where their lines lie."""

    first: int
    rows_before: int
    """Records of the file that came before the segment."""
    entries: Array
    path: pathlib.Path
    offset: int

    def lines(self) -> bytes:
        """The lines, newlines and all."""
        with self.path.open("rb") as f:
            f.seek(self.offset)
            return f.read(int(self.entries["size"].sum()))

    def chosen(self, places: Array) -> Iterator[bytes]:
        """The lines at some places of this block, without their newlines; the others are not read."""
        if len(places):
            ends = np.cumsum(self.entries["size"], dtype=np.int64)
            with self.path.open("rb", buffering=0) as f:
                for place in places.tolist():
                    size = int(self.entries["size"][place])
                    yield os.pread(f.fileno(), size - 1, self.offset + int(ends[place]) - size)


def _bounded(entries: Array) -> Iterator[Array]:
    """The entries in pieces whose lines are few bytes, or one line."""
    ends = np.cumsum(entries["size"], dtype=np.int64)
    begin = 0
    while begin < len(entries):
        taken = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, taken + _BLOCK_BYTES, side="right")))
        yield entries[begin:end]
        begin = end


class Spool:
    """All rows that were written, in order of their segments."""

    def __init__(self, folder: pathlib.Path, rows_before: Sequence[int]) -> None:
        self._folder = folder
        self._rows_before = rows_before
        self.rows = sum(self._size(n) for n in range(len(rows_before)))

    def _size(self, number: int) -> int:
        return entries_path(self._folder, number).stat().st_size // ENTRY.itemsize

    def blocks(self) -> Iterator[Block]:
        """Every row, some thousands at a time."""
        first = 0
        for number, before in enumerate(self._rows_before):
            offset = 0
            with entries_path(self._folder, number).open("rb") as f:
                while data := f.read(_BLOCK_ROWS * ENTRY.itemsize):
                    for entries in _bounded(np.frombuffer(data, ENTRY)):
                        yield Block(first, before, entries, rows_path(self._folder, number), offset)
                        first += len(entries)
                        offset += int(entries["size"].sum())

    def bound(self) -> tuple[Array, Array]:
        """Places of rows that belong to others, and the key that they share with these."""
        first, found = 0, [np.zeros((0, 2), np.uint64)]
        for number in range(len(self._rows_before)):
            path = _bound_path(self._folder, number)
            if path.exists():
                pairs = np.fromfile(path, np.uint64).reshape(-1, 2)
                pairs[:, 0] += np.uint64(first)
                found.append(pairs)
            first += self._size(number)
        pairs = np.concatenate(found)
        return pairs[:, 0], pairs[:, 1]

    def spent(self) -> Iterator[Block]:
        """As blocks; lines of a segment are deleted when the next one begins, so that disk and memory serve twice."""
        gone: pathlib.Path | None = None
        for block in self.blocks():
            if gone is not None and gone != block.path:
                gone.unlink()
            gone = block.path
            yield block
        if gone is not None:
            gone.unlink()

    def lines(self) -> Iterator[bytes]:
        """Every line in order, without its newline."""
        for number in range(len(self._rows_before)):
            with rows_path(self._folder, number).open("rb", buffering=1 << 20) as f:
                for line in f:
                    yield line[:-1]
