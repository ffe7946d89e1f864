"""Text out of tokens: never a torn character, never a piece of a stop string.

Law of this room: pure. What was given out is final: the pieces joined are the
decoded whole, cut before the first stop string that became complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TORN = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes, so at most three can wait for their last.
_MAY_CHANGE = 3


@dataclass(slots=True)
class Detokeniser:
    """Decodes tokens one by one.

    Promises that the pieces joined equal the text that `decode` gives for all
    tokens after the context. Holds back a character whose bytes are not all
    there; `flush` gives out what never became whole. Does not know stop strings.
    """

    decode: Callable[[Sequence[int]], str]
    context: Sequence[int] = ()
    """Last tokens of the prompt: some tokenizers drop a space that begins a text."""
    _window: list[int] = field(default_factory=list)
    _before: int = 0
    """Tokens of the window whose text is given out in full."""
    _given: int = 0
    """Characters given out of the text after those."""

    def __post_init__(self) -> None:
        self._window = list(self.context)
        self._before = len(self._window)

    def push(self, token: int) -> str:
        """The text that is certain now; often empty."""
        self._window.append(token)
        fresh = self._fresh()
        torn = min(len(fresh) - len(fresh.rstrip(TORN)), _MAY_CHANGE)
        certain = fresh[: len(fresh) - torn]
        piece = certain[self._given :]
        if torn or not fresh:
            self._given = max(self._given, len(certain))
        else:
            # Everything is whole: the next window needs only these tokens as its left side.
            self._window = self._window[self._before :]
            self._before = len(self._window)
            self._given = 0
        return piece

    def flush(self) -> str:
        """What was held back."""
        piece = self._fresh()[self._given :]
        self._given += len(piece)
        return piece

    def _fresh(self) -> str:
        left = self.decode(self._window[: self._before]) if self._before else ""
        return self.decode(self._window)[len(left) :]


@dataclass(slots=True)
class StopFilter:
    """Passes text on until a stop string is complete.

    Promises the same result however the text is cut into pieces: it ends before
    the stop string that is complete first (of two at once, the longer). Holds
    back only what could still begin a stop string.
    """

    stops: tuple[str, ...]
    _held: str = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may go out, and whether a stop string came."""
        if not self.stops:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, begin = min(found)
            out, self._held = self._held[:begin], ""
            return out, True
        keep = max(self._overlap(stop) for stop in self.stops)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return out, False

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
