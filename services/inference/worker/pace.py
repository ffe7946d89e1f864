"""How many tokens of prompts are read in one step.

Law of this room: pure; seconds are told. A step that reads takes little more than half as long again as one that
does not, so that those who get tokens hardly notice a long prompt beside them; and never much longer than a short
request could bear to wait. Where more wait for their first token than get others, they count for more.
"""

from __future__ import annotations

from dataclasses import dataclass

_LEAST, _MOST = 32, 2048
_ALONE, _BESIDE = 0.02, 0.01
"""Seconds of reading in a step that nobody minds: where nobody gets tokens, and where somebody does."""
_PART = 0.6
"""Of a step without reading, how much reading may take beside it."""
_NEW = 0.2
"""How much the newest step counts."""


@dataclass(slots=True)
class Pace:
    """What steps took, and what the next may read."""

    row_seconds: float = 0.0
    """Of a step without reading."""
    token_seconds: float = 0.0
    """Of each token read."""

    def note(self, seconds: float, read: int, rows: int) -> None:
        """Takes a step into account: how long it took, tokens of prompts it read, rows that got a token."""
        if not read:
            self.row_seconds = _mean(self.row_seconds, seconds)
        elif read >= _LEAST:
            beside = self.row_seconds if rows else 0.0
            self.token_seconds = _mean(self.token_seconds, max(seconds - beside, seconds / 4) / read)

    def tokens(self, rows: int, prompts: int = 1) -> int:
        """Tokens of prompts for the next step, beside so many rows that get a token, where so many prompts wait."""
        if not self.token_seconds:
            return min(4 * _LEAST * prompts, _MOST)
        allowed = max(_BESIDE, _PART * self.row_seconds) if rows else _ALONE
        allowed *= max(1.0, prompts / max(1, rows))
        return int(min(max(allowed / self.token_seconds, _LEAST), _MOST))


def _mean(before: float, now: float) -> float:
    return now if not before else before + _NEW * (now - before)
