"""How many tokens of prompts are read in one step.

Law of this room: pure; seconds are told. A step that reads takes little more than half as long again as one that
does not, so that those who get tokens hardly notice a long prompt beside them; and never much longer than a short
request could bear to wait. Where several wait for their first token, they count for more. What a step that reads
costs however little it reads is told from what each token costs: reading less than is worth that helps nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

_LEAST, _MOST = 32, 2048
_BESIDE, _ALONE, _FIRST = 0.01, 0.03, 0.25
"""Seconds of reading in a step that nobody minds: where somebody gets tokens, where nobody does, and where nobody
does and a short prompt waits."""
_PART = 0.6
"""Of a step without reading, how much reading may take beside it."""
_OTHERS = 16
"""How much each further one who waits counts beside one who gets tokens."""
_LONGEST = 0.4
"""Seconds of reading in a step, however many wait."""
_NEW = 0.2
"""How much the newest step counts."""
_SOME, _ODD = 3.0, 2.0
"""Once some steps were seen, one counts for no more than so many times what was expected: a library may just have
prepared itself for a number of tokens."""
_FORGET = 0.9
"""How much of what steps that read have told remains with each new one."""


@dataclass(slots=True)
class Pace:
    """What steps took, and what the next may read."""

    row_seconds: float = 0.0
    """Of a step without reading."""
    _weight: float = 0.0
    _read: float = 0.0
    _took: float = 0.0
    _read_read: float = 0.0
    _read_took: float = 0.0

    def note(self, seconds: float, read: float, rows: int) -> None:
        """Takes a step into account: how long it took, tokens of prompts it read, rows that got a token."""
        if not read:
            self.row_seconds += (_NEW if self.row_seconds else 1.0) * (seconds - self.row_seconds)
            return
        took = max(seconds - (self.row_seconds if rows else 0.0), seconds / 4)
        if self._weight > _SOME:
            fixed, each = self.costs()
            took = min(took, _ODD * (fixed + each * read))
        self._weight = self._weight * _FORGET + 1
        self._read = self._read * _FORGET + read
        self._took = self._took * _FORGET + took
        self._read_read = self._read_read * _FORGET + read * read
        self._read_took = self._read_took * _FORGET + read * took

    def costs(self) -> tuple[float, float]:
        """Seconds that reading costs in a step, and with each token: a line through what steps took."""
        if not self._read:
            return 0.0, 0.0
        through_zero = self._took / self._read
        spread = self._weight * self._read_read - self._read**2
        if spread < 0.01 * self._read**2:  # all read about as many
            return 0.0, through_zero
        slope = (self._weight * self._read_took - self._read * self._took) / spread
        slope = min(max(slope, through_zero / 4), through_zero)
        return (self._took - slope * self._read) / self._weight, slope

    def tokens(self, rows: int, prompts: int = 0) -> int:
        """Tokens of prompts for the next step, beside so many rows that get one, where so many short prompts wait."""
        fixed, each = self.costs()
        if not each:
            return min(4 * _LEAST * max(1, prompts), _MOST)
        alone = _FIRST if prompts else _ALONE
        allowed = max(_BESIDE, _PART * self.row_seconds) if rows else alone
        allowed = max(allowed, min(allowed * (1 + _OTHERS * max(0, prompts - 1) / max(1, rows)), _LONGEST))
        worth = min(fixed, allowed) / each
        return int(min(max((allowed - fixed) / each, worth, _LEAST), _MOST))
