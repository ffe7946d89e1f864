"""Rows of equal content, found without holding them: sorted, one part of them at a time.

Law of this room: of equal rows the first in order is the one that stays. Memory
is bounded by one part, whatever the number of rows.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from services.datasets.worker.spool import Spool

PART_ROWS = 1 << 20
_PLACED = np.dtype([("content", "<u8", 2), ("at", "<u8")])

Places = npt.NDArray[Any]


def repeated(spool: Spool, scratch: pathlib.Path, part_rows: int = PART_ROWS) -> Places:
    """Places of the rows whose content an earlier row has, rising."""
    parts = max(1, -(-spool.rows // part_rows))
    paths = [scratch / f"contents-{n}" for n in range(parts)]
    files = [p.open("wb") for p in paths]
    try:
        for block in spool.blocks():
            placed = np.empty(len(block.entries), _PLACED)
            placed["content"] = block.entries["content"]
            placed["at"] = np.arange(block.first, block.first + len(placed), dtype=np.uint64)
            belongs = placed["content"][:, 0] % np.uint64(parts)
            for n, f in enumerate(files):
                f.write((placed if parts == 1 else placed[belongs == n]).tobytes())
    finally:
        for f in files:
            f.close()
    found = []
    for path in paths:
        placed = np.fromfile(path, _PLACED)
        path.unlink()
        high, low, at = placed["content"][:, 0], placed["content"][:, 1], placed["at"]
        order = np.lexsort((at, low, high))
        high, low = high[order], low[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        found.append(at[order[1:][same]])
    return np.sort(np.concatenate(found)).astype(np.int64)
