"""Pipelines: steps that change rows, or leave them out, in the order in which they were asked for.

Law of this room: a step sees one row at a time and nothing else, so rows can be
worked on in any order and by several processes. Plug-ins bring steps by the
entry point group `qlorad.steps`; they are loaded here, in a worker, only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qlorad.v1 import datasets_pb2
from services.datasets.worker.plain import Plain


class Pipeline:
    """Steps in order, and what they did."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.applied: list[datasets_pb2.AppliedStep] = []

    @classmethod
    def load(cls, steps: Sequence[datasets_pb2.Step]) -> Pipeline:
        """The pipeline of a request; INVALID_ARGUMENT with every violation."""
        return cls()

    def __len__(self) -> int:
        return 0

    def apply(self, example: Plain) -> Plain | None:
        """The row behind the last step; None where a step left it out."""
        return example
