"""Rows on the shelf: JSONL shards of at most 64 MB with an offset index.

Law of this room: a row is one line without its newline. `SPLIT-NNNNN.jsonl`
hold the lines, `SPLIT.index` one little-endian u64 a row: shard number in the
upper 24 bits, offset in the lower 40. Reading a row touches that row alone.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import pathlib
import struct
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import BinaryIO

SHARD_BYTES = 64 << 20
_ENTRY = struct.Struct("<Q")
_OFFSET_BITS = 40
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


def splits_in(folder: pathlib.Path) -> list[str]:
    """Names of the splits that lie in a folder: train, validation, test first, then by name."""
    order = {"train": 0, "validation": 1, "test": 2}
    found = [p.stem for p in folder.glob("*.index")]
    return sorted(found, key=lambda s: (order.get(s, 3), s))


class ShardWriter:
    """Writes one split, row by row; memory does not grow with rows. `whole` hears of each shard that is."""

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        shard_bytes: int = SHARD_BYTES,
        whole: Callable[[pathlib.Path], object] | None = None,
    ) -> None:
        self._whole = whole
        self._folder = folder
        self._split = split
        self._limit = shard_bytes
        self._index = (folder / f"{split}.index").open("wb")
        self._shard: BinaryIO | None = None
        self._number = -1
        self._at = 0
        self.rows = 0

    def add(self, line: bytes) -> None:
        """Appends a row; it must not hold a newline."""
        if b"\n" in line:
            raise ValueError("a row must be one line")
        if self._shard is None or (self._at and self._at + len(line) + 1 > self._limit):
            self._next_shard()
        assert self._shard is not None
        self._index.write(_ENTRY.pack(self._number << _OFFSET_BITS | self._at))
        self._shard.write(line + b"\n")
        self._at += len(line) + 1
        self.rows += 1

    def add_run(self, lines: memoryview, sizes: Sequence[int]) -> None:
        """Appends rows that lie end to end, each with its newline; `sizes` count the newlines too."""
        first, taken = 0, 0
        while first < len(sizes):
            if self._shard is None or (self._at and self._at + sizes[first] > self._limit):
                self._next_shard()
            assert self._shard is not None
            shard = self._number << _OFFSET_BITS
            starts = list(itertools.accumulate(sizes[first:], initial=shard + self._at))
            # Rows whose end lies within the limit; one that is longer has a shard of its own.
            count = max(1, bisect.bisect_right(starts, shard + self._limit) - 1)
            self._index.write(struct.pack(f"<{count}Q", *starts[:count]))
            end = taken + starts[count] - starts[0]
            self._shard.write(lines[taken:end])
            self._at, taken = starts[count] - shard, end
            first += count
        self.rows += len(sizes)

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            if self._whole is not None:
                self._whole(pathlib.Path(self._shard.name))

    def _next_shard(self) -> None:
        self._end_shard()
        self._number += 1
        self._at = 0
        self._shard = (self._folder / f"{self._split}-{self._number:05d}.jsonl").open("wb")

    def close(self) -> None:
        """Ends the split. Durability is the shelf's business, at sealing."""
        self._index.close()
        self._end_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ShardReader:
    """Reads one split; rows by number or in order."""

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        self._index = (folder / f"{split}.index").read_bytes()
        self._shards = [_map(p) for p in sorted(folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].jsonl"))]

    def __len__(self) -> int:
        return len(self._index) // _ENTRY.size

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(row)
        (entry,) = _ENTRY.unpack_from(self._index, row * _ENTRY.size)
        shard, offset = self._shards[entry >> _OFFSET_BITS], entry & _OFFSET_MASK
        return bytes(shard[offset : shard.find(b"\n", offset)])

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))


def _map(path: pathlib.Path) -> mmap.mmap:
    with path.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
