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


def bound(spool: Spool, groups: Array | None) -> Array | None:
    """The groups, joined where rows were made of one paper: what was learnt of it would be asked of it.

    What has near or equal rows in two papers joins these too. Without papers the groups are as they were.
    """
    places, keys = spool.bound()
    if not len(places):
        return groups
    contents = np.empty(spool.rows, np.uint64)
    for block in spool.blocks():
        contents[block.first : block.first + len(block.entries)] = block.entries["content"][:, 0]
    papers = np.arange(spool.rows)
    _, first, of_key = np.unique(keys, return_index=True, return_inverse=True)
    papers[places] = places[first][of_key]
    ties = [np.unique(contents, return_inverse=True)[1], papers]
    if groups is not None:
        ties.append(groups)
    labels = np.arange(spool.rows)
    while True:
        before = labels
        for tie in ties:
            lowest = np.full(spool.rows, spool.rows)
            np.minimum.at(lowest, tie, labels)
            labels = lowest[tie]
        if np.array_equal(before, labels):
            return labels


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
    different, back = np.unique(contents, return_inverse=True)
    del contents
    # Equal rows may be of several kinds, as of two files: the lowest, so that order does not matter.
    kinds = np.full(len(different), np.iinfo(np.uint32).max, np.uint32)
    np.minimum.at(kinds, back, strata)
    if groups is None:
        drawn = split.sides(different, kinds, asked)
        return drawn if isinstance(drawn, Problem) else drawn[back]
    # A row that was left out has its own place as its group, which is above that of the equal row that stays.
    group = np.full(len(different), spool.rows)
    np.minimum.at(group, back, groups)
    # `different` rises, so the first content of a group is its lowest.
    _, lowest, of_content = np.unique(group, return_index=True, return_inverse=True)
    drawn = split.sides(different[lowest], kinds[lowest], asked)
    return drawn if isinstance(drawn, Problem) else drawn[of_content][back]


def straddling(spool: Spool, keep: Array, groups: Array | None, sides: Array) -> Array:
    """Places of the kept rows that are equal or nearly equal to one of another side, where the source made the sides.

    Of such rows those of the first side are not told, so of train and test those of test.
    """
    if groups is None:
        contents = np.concatenate([np.zeros(0, np.uint64), *(b.entries["content"][:, 0] for b in spool.blocks())])
        _, groups = np.unique(contents, return_inverse=True)
    first = np.full(spool.rows, len(split.SIDES), np.uint8)
    np.minimum.at(first, groups[keep], sides[keep])
    return np.flatnonzero(keep & (sides > first[groups]))
