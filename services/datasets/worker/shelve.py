"""From the spool to the shards of each side, and what the kept rows sum up to.

Law of this room: rows are moved in runs, never one by one; a row that is not
kept is on no side and in no sum.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlorad.v1 import datasets_pb2
from services.common.shards import ShardWriter
from services.common.shelf import fsync_path
from services.datasets.worker.split import SIDES
from services.datasets.worker.spool import Block, Spool

Array = npt.NDArray[Any]

BOUNDS = tuple(1 << n for n in range(5, 21))
"""Of the histogram of characters."""


@dataclass(slots=True)
class Totals:
    """Sums over the kept rows."""

    rows: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    characters: int = 0
    words: int = 0
    forms: Counter[int] = field(default_factory=Counter)
    lengths: Array = field(default_factory=lambda: np.zeros(len(BOUNDS) + 1, np.int64))

    @property
    def histogram(self) -> datasets_pb2.Histogram:
        return datasets_pb2.Histogram(bounds=BOUNDS, counts=self.lengths.tolist())

    def add(self, entries: Array) -> None:
        """Counts kept rows."""
        self.kept += len(entries)
        self.characters += int(entries["characters"].sum(dtype=np.int64))
        self.words += int(entries["words"].sum(dtype=np.int64))
        for form, n in zip(*np.unique(entries["form"], return_counts=True), strict=True):
            self.forms[int(form)] += int(n)
        places = np.searchsorted(BOUNDS, entries["characters"])
        self.lengths += np.bincount(places, minlength=len(BOUNDS) + 1)


def distribute(
    spool: Spool,
    keep: Array,
    sides: Array,
    payload: pathlib.Path | None,
    asked: Mapping[str, bool],
    tell: Callable[[str, int, int], None],
) -> Totals:
    """Writes every kept row to its side, in order; only counts where there is no payload. Spends the lines."""
    totals = Totals()
    kept_sides = np.bincount(sides[keep], minlength=len(SIDES))
    wanted = {name: int(n) for name, n in zip(SIDES, kept_sides, strict=True) if n or asked.get(name)}
    totals.rows = wanted
    syncing: list[Future[None]] = []
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as stack:
        writers = {}
        if payload is not None:

            def start(path: pathlib.Path) -> None:
                # Sealing waits for the disk; it waits less if the disk begins now.
                syncing.append(beside.submit(fsync_path, path))

            writers = {SIDES.index(n): stack.enter_context(ShardWriter(payload, n, whole=start)) for n in wanted}
        for block in spool.spent() if writers else spool.blocks():
            here = slice(block.first, block.first + len(block.entries))
            totals.add(block.entries[keep[here]])
            if writers:
                _move(block, np.where(keep[here], sides[here], 255), writers)
            tell("write", block.first + len(block.entries), spool.rows)
    for done in syncing:
        done.result()  # a fault of the disk is told once, and to whoever asked first
    return totals


def _move(block: Block, target: Array, writers: Mapping[int, ShardWriter]) -> None:
    """Writes each run of rows that go to one side."""
    lines = memoryview(block.lines())
    sizes = block.entries["size"]
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = np.flatnonzero(target[1:] != target[:-1]) + 1
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(target)], strict=True):
        writer = writers.get(int(target[begin]))
        if writer is not None:
            at = int(ends[begin - 1]) if begin else 0
            writer.add_run(lines[at : int(ends[end - 1])], sizes[begin:end].tolist())
