"""What of an example a row of a form has no place for.

Law of this room: pure. A loss is told by field, place and reason; who writes
rows decides nothing about what losses are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = "parts"
"""How a text is cut into parts: told where it is lost, but no reason to refuse, since the text is whole."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Something of an example that a row does not have."""

    field: str
    """What, as the summary counts it: "tools"."""
    place: str
    """Where: "messages[2].tool_calls"."""
    why: str


class CannotCarry(Exception):
    """An example that a form has no row for, whatever one would drop."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class Losses(list[Loss]):
    """What was lost so far."""

    def note(self, field: str, why: str, place: str = "") -> None:
        self.append(Loss(field, place or field, why))

    @property
    def first_grave(self) -> Loss | None:
        """The first loss that is one of content."""
        return next((loss for loss in self if loss.field != PARTS), None)
