"""One number for all rows of a split: what the ledger sealed and the trainer compares.

Law of this room: the number does not depend on the order of rows, and names how
often each occurs. The first token of a row has nothing before it, so whether it
is marked as trained does not count.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_BYTES = 16
_PLACES = 1 << (8 * _BYTES)
_PIECE_BITS = 16
PIECES = 8 * _BYTES // _PIECE_BITS


def row_number(ids: npt.NDArray[np.uint32], mask: bytes) -> int:
    """The number of one row: its ids and which of them carry loss."""
    digest = hashlib.blake2b(ids.astype("<u4", copy=False).tobytes(), digest_size=_BYTES)
    digest.update(b"\0" + mask[1:])
    return int.from_bytes(digest.digest(), "little")


def plus(a: int, b: int) -> int:
    """Two numbers as one."""
    return (a + b) % _PLACES


def text_of(number: int) -> str:
    """As ledgers and events tell it."""
    return f"{number:0{2 * _BYTES}x}"


def number_of(text: str) -> int:
    return int(text, 16)


def pieces(number: int) -> list[float]:
    """The number cut small, so that ranks can add it as floats without loss."""
    return [float(number >> (n * _PIECE_BITS) & ((1 << _PIECE_BITS) - 1)) for n in range(PIECES)]


def joined(sums: list[float]) -> int:
    """The number of pieces that were added."""
    return sum(int(s) << (n * _PIECE_BITS) for n, s in enumerate(sums)) % _PLACES
