"""Secrets and personal data, hidden.

Law of this room: pure; what counts as one is decided where it is also found.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.datasets.worker import private
from services.datasets.worker.plain import Plain
from services.datasets.worker.steps import api


@dataclass(frozen=True, slots=True)
class Redact:
    """Writes the kind in brackets, as in [e-mail], in place of each secret and of personal data."""

    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Arguments of tool calls and metadata are not touched."""
        return api.map_texts(example, lambda text: private.redact(text)[0], self.where)
