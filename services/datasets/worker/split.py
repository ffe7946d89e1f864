"""Which rows are set aside: by content and seed, never by place.

Law of this room: pure. Rows of equal or nearly equal content are one group and
go to one side. A group's rank is its content's hash mixed with the seed; the
lowest ranks of a stratum are validation, the next test. So the split does not
change when rows change order, and a row more moves few others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qlorad.v1 import datasets_pb2
from services.datasets.worker.found import INFO, WARNING, Problem, clip
from services.datasets.worker.layout import split_of

Array = npt.NDArray[Any]

SIDES = ("train", "validation", "test")
_MASK = (1 << 64) - 1


def named(name: str) -> tuple[int, Problem | None]:
    """The side, as a number in SIDES, that a source's name for a split means, and what is to be told of it."""
    if (usual := split_of(name)) in SIDES:
        return SIDES.index(usual), None
    words = {split_of(word) for word in re.split(r"[-._ 0-9]+", name)} & set(SIDES)
    if len(words) == 1:
        (meant,) = words
        told = f"the split {clip(name)} is read as {meant}"
        return SIDES.index(meant), Problem("unknown_split", told, "name the splits to read", "", INFO)
    told = f"{clip(name)} is no usual name of a split" if name else "the source names no split"
    hint = "set rows aside by fractions, or leave the split out if it is not to be trained"
    return 0, Problem("unknown_split", f"{told}: its rows go to train", hint, "", WARNING)


def _mixed(value: int) -> int:
    """One number of another, far apart for neighbours (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def ranks(contents: Array, seed: int) -> Array:
    """Each group's place in the draw of a seed; `contents` are the first 8 bytes of its hash."""
    x = contents.astype(np.uint64) ^ np.uint64(_mixed(seed))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def share(groups: int, fraction: float) -> int:
    """How many groups a fraction is; at least one of a fraction above zero."""
    return max(1, round(groups * fraction)) if fraction > 0 else 0


def sides(contents: Array, strata: Array, asked: datasets_pb2.Split) -> Array | Problem:
    """The side of each group, as a number in SIDES, or why the split cannot be.

    `contents` are all different; `strata` number the kinds that each get their share.
    """
    side = np.zeros(len(contents), np.uint8)
    if not (asked.validation_fraction or asked.test_fraction):
        return side
    place = ranks(contents, asked.seed)
    # Equal ranks of different contents: the content decides, so that order does not.
    order = np.lexsort((contents, place, strata))
    kinds, begins = np.unique(strata[order], return_index=True)
    ends = [*begins[1:], len(order)]
    trained = 0
    for begin, end in zip(begins, ends, strict=True):
        groups = end - begin
        validation, test = share(groups, asked.validation_fraction), share(groups, asked.test_fraction)
        if len(kinds) > 1:  # a kind too small for a share of its own is trained
            validation, test = _fitting(groups, validation, test)
        side[order[begin : begin + validation]] = 1
        side[order[begin + validation : begin + validation + test]] = 2
        trained += max(0, groups - validation - test)
    if trained <= 0:
        counts = {name: int((side == n).sum()) for n, name in enumerate(SIDES)}
        told = (
            f"of {len(contents)} different rows {counts['validation']} go to validation and {counts['test']} to test; "
            "none is left to train"
        )
        return Problem("split_leaves_nothing", told, "smaller fractions, or more rows")
    return side


def _fitting(groups: int, validation: int, test: int) -> tuple[int, int]:
    if validation + test < groups:
        return validation, test
    return (validation, 0) if validation and validation < groups else (0, 0)


def counts(side: Array, asked: Mapping[str, bool]) -> dict[str, int]:
    """Rows by side; a side that was asked for stands there with 0."""
    return {name: int((side == n).sum()) for n, name in enumerate(SIDES) if asked.get(name) or (side == n).any()}
