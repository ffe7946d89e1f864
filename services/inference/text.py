"""Text out of tokens: never a torn character, never a piece of a stop string.

Law of this room: pure. What was given out is final: the pieces joined are the
decoded whole, cut before the first stop string that became complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

TORN = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes, so at most three can wait for their last.
_MAY_CHANGE = 3
_NEAR = 8
"""Tokens on which the text of the one behind them may depend: twice those that a character can be spelled by."""


class Detokeniser(Protocol):
    """Text of tokens, one by one: the pieces joined are the text of the whole.

    Holds back a character whose bytes are not all there; `flush` gives out what
    never became whole. A token costs the same however many came before it. Does
    not know stop strings.
    """

    def push(self, token: int) -> str:
        """The text that is certain now; often empty."""

    def flush(self) -> str:
        """What was held back."""


@dataclass(slots=True)
class FromBytes:
    """A Detokeniser where each token is certain bytes, whatever stands beside it. Bad bytes alone are U+FFFD."""

    bytes_of: Callable[[int], bytes]
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def push(self, token: int) -> str:
        return self._utf8.decode(self.bytes_of(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(slots=True)
class FromText:
    """A Detokeniser for every tokenizer: decodes the newest tokens anew behind those before them.

    Promises that the pieces joined equal the text that `decode` gives for all
    tokens after the context, where a token's text depends on no more than the
    `_NEAR` before it.
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
        self._window.append(token)
        fresh = self._fresh()
        torn = min(len(fresh) - len(fresh.rstrip(TORN)), _MAY_CHANGE)
        certain = fresh[: len(fresh) - torn]
        piece = certain[self._given :]
        if torn or not fresh:
            self._given = max(self._given, len(certain))
            if len(self._window) - self._before >= 2 * _NEAR:
                piece += self._forget(fresh[self._given :])
        else:
            # Everything is whole: the next window needs only these tokens as its left side.
            self._window = self._window[self._before :]
            self._before = len(self._window)
            self._given = 0
        return piece

    def flush(self) -> str:
        piece = self._fresh()[self._given :]
        self._given += len(piece)
        return piece

    def _fresh(self) -> str:
        left = self.decode(self._window[: self._before]) if self._before else ""
        return self.decode(self._window)[len(left) :]

    def _forget(self, held: str) -> str:
        """Keeps the newest tokens alone, though the text may still be torn; what must be given out for that."""
        self._window = self._window[-_NEAR:]
        near = self.decode(self._window)
        if near.endswith(held) and len(near) > len(held):
            self._before, self._given = 0, len(near) - len(held)
            return ""
        # So many tokens said nothing that what is held will never be whole.
        self._before, self._given = len(self._window), 0
        return held


def detokeniser(
    decode: Callable[[Sequence[int]], str], bytes_of: Callable[[int], bytes] | None, context: Sequence[int]
) -> Detokeniser:
    """The quickest that there is for a tokenizer, behind these tokens of a prompt."""
    return FromText(decode, context) if bytes_of is None else FromBytes(bytes_of)


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
