"""Named, safe repairs of rows, applied only where they were asked for.

Law of this room: pure; a repair changes what its name says and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from services.datasets.worker.found import Problem
from services.datasets.worker.plain import Plain


class Repairs:
    """The repairs that were asked for, and how often each was applied."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.applied: Counter[str] = Counter()

    def mend_value(self, value: Any, problem: Problem) -> dict[str, Any] | None:
        """The row of a value that was parsed but is spoiled; None where no repair mends it."""
        return None

    def mend(self, example: Plain, problems: list[Problem]) -> tuple[Plain, list[Problem]]:
        """The example mended, and the problems that stay."""
        return example, problems
