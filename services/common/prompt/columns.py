"""Rows of varying length as flat files that are mapped, not read.

Law of this room: little-endian, no header; SPLIT.NAME holds the values of all
rows end to end, SPLIT.NAME.at one u64 a row and one more: where each row begins.
SPLIT.place holds one record a row, so it needs no .at.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

_AT = np.dtype("<u8")
_TYPES: Mapping[str, np.dtype[Any]] = {
    "ids": np.dtype("<u4"),
    "mask": np.dtype("u1"),
    "cut": np.dtype("<u4"),
    "text": np.dtype("u1"),
}
Array = npt.NDArray[Any]
PLACE = np.dtype([("row", "<u8"), ("line", "<u8"), ("file", "<u4"), ("piece", "<u4")])
"""Number of the source row, its line, the number of its file, which piece of it."""
_PLACE = struct.Struct("<QQII")


class ColumnWriter:
    """Writes one column row by row; memory does not grow with rows."""

    def __init__(self, folder: pathlib.Path, split: str, name: str) -> None:
        self._type = _TYPES[name]
        self._values = (folder / f"{split}.{name}").open("wb")
        self._at = (folder / f"{split}.{name}.at").open("wb")
        self._end = 0
        self._mark()

    def add(self, values: Sequence[int] | Array | bytes) -> None:
        """Appends one row."""
        if len(values):
            self._values.write(values if isinstance(values, bytes) else np.asarray(values, dtype=self._type).tobytes())
            self._end += len(values)
        self._mark()

    def close(self) -> None:
        self._values.close()
        self._at.close()

    def _mark(self) -> None:
        self._at.write(self._end.to_bytes(8, "little"))

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Column:
    """Reads one column; a row is a view of the mapped file."""

    def __init__(self, folder: pathlib.Path, split: str, name: str) -> None:
        self._at = _map(folder / f"{split}.{name}.at", _AT)
        self._values = _map(folder / f"{split}.{name}", _TYPES[name])

    def __len__(self) -> int:
        return len(self._at) - 1

    def __getitem__(self, row: int) -> Array:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._values[int(self._at[row]) : int(self._at[row + 1])]

    def lengths(self) -> Array:
        """Length of every row."""
        return np.diff(self._at).astype(np.int64)


class PlaceWriter:
    """Writes where rows came from; knows the names of files."""

    def __init__(self, folder: pathlib.Path, split: str, files: dict[str, int]) -> None:
        self._out = (folder / f"{split}.place").open("wb")
        self._files = files

    def add(self, row: int, file: str, line: int, piece: int) -> None:
        """Appends one row."""
        number = self._files.setdefault(file, len(self._files))
        self._out.write(_PLACE.pack(row, line, number, piece))

    def __enter__(self) -> PlaceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()


def places(folder: pathlib.Path, split: str) -> Array | None:
    """Where rows came from; None in ledgers that do not tell it."""
    path = folder / f"{split}.place"
    return _map(path, PLACE) if path.exists() else None


def _map(path: pathlib.Path, kind: np.dtype[Any]) -> Array:
    if path.stat().st_size == 0:
        return np.zeros(0, kind)
    return np.memmap(path, kind, mode="r")
