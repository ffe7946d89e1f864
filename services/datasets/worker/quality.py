"""A score for a dataset that says how it was made.

Law of this room: pure; the score is the weighted mean of parts that are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlorad.v1 import datasets_pb2


@dataclass(frozen=True, slots=True)
class Figures:
    """What the score is made of."""

    read: int
    skipped: int
    repeated: int
    near: int
    kept: int
    words: int
    findings: Mapping[str, int]


def score(figures: Figures) -> datasets_pb2.Quality:
    """The score and its parts."""
    read = max(1, figures.read)
    valid = 100.0 * (read - figures.skipped) / read
    part = datasets_pb2.QualityPart(
        name="valid_rows", score=valid, weight=1.0, told=f"{figures.skipped} of {figures.read} rows have errors"
    )
    return datasets_pb2.Quality(score=valid, parts=[part])
