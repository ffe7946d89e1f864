"""Rows of a sealed dataset, as records again.

Law of this room: what is sealed was canonical when it was sealed, and its bytes
were verified when it was opened, so it is taken as it is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import orjson

from services.common.shards import ShardReader
from services.datasets.worker.found import Record


class Parent:
    """One split of a sealed dataset."""

    def __init__(self, payload: pathlib.Path, split: str) -> None:
        self._rows = ShardReader(payload, split)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        for number, line in enumerate(self._rows, 1):
            yield Record(number, orjson.loads(line))
