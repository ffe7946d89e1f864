"""Secrets and personal data in rows: told, never shown.

Law of this room: pure. A finding names kind and place, not the text itself.
"""

from __future__ import annotations

from services.datasets.worker.found import Problem
from services.datasets.worker.plain import Plain


def scan(example: Plain) -> list[Problem]:
    """What of a row looks like a secret or like somebody's data."""
    return []
