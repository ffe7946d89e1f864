"""Which rows belong together, and on which side of the split each group goes.

Law of this room: a group is known by the lowest of its contents, whatever the
order of rows, so the same rows are set aside however they are shuffled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qlorad.v1 import datasets_pb2
from services.datasets.worker import split
from services.datasets.worker.found import Problem
from services.datasets.worker.spool import Spool

Array = npt.NDArray[Any]


def wanted(request: datasets_pb2.CreateDatasetRequest) -> datasets_pb2.NearDuplicates.ValueType:
    """What is to be done about near duplicates; never UNSPECIFIED."""
    if request.near_duplicates:
        return request.near_duplicates
    splits = request.split.validation_fraction or request.split.test_fraction
    return datasets_pb2.NEAR_DUPLICATES_TOGETHER if splits else datasets_pb2.NEAR_DUPLICATES_IGNORE


def sides(spool: Spool, groups: Array | None, asked: datasets_pb2.Split) -> Array | Problem:
    """The side of every row, or why the split cannot be."""
    found = np.zeros(spool.rows, np.uint8)
    if asked.keep_source:
        for block in spool.blocks():
            found[block.first : block.first + len(block.entries)] = block.entries["side"]
        return found
    if not (asked.validation_fraction or asked.test_fraction) or not spool.rows:
        return found
    contents, strata = np.empty(spool.rows, np.uint64), np.empty(spool.rows, np.uint32)
    for block in spool.blocks():
        here = slice(block.first, block.first + len(block.entries))
        contents[here], strata[here] = block.entries["content"][:, 0], block.entries["stratum"]
    if groups is not None:
        order = np.lexsort((contents, groups))
        heads = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
        lowest, sizes = order[heads], np.diff(np.r_[heads, len(order)])
        by_group_contents, by_group_strata = contents[lowest], strata[lowest]
        contents[order], strata[order] = np.repeat(by_group_contents, sizes), np.repeat(by_group_strata, sizes)
    different, first, back = np.unique(contents, return_index=True, return_inverse=True)
    drawn = split.sides(different, strata[first], asked)
    return drawn if isinstance(drawn, Problem) else drawn[back]
