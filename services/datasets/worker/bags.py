"""Rows as bags of words, hashed, lying on disk.

Law of this room: what a row's bag is depends on its texts alone. The normal form
is NFKC without case; a word is a run of letters, marks and digits, and all else
only parts words. Scripts that set no blanks give single characters (Han, and
emoji), pairs (kana) or triples (Thai, Lao, Khmer, Burmese). A word that stands
twice is two members, "the first" and "the second", so that the Jaccard
similarity of two bags says how many words were changed: one word in ten gives
0.82, whatever the length of the row, where shingles of three words give 0.54.
"""

from __future__ import annotations

import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from services.datasets.worker.plain import texts
from services.datasets.worker.spool import Spool

Array = npt.NDArray[Any]

MAX_CHARACTERS = 1 << 18
"""Of a row that are compared; a longer one is known by its beginning."""
_BATCH_CHARACTERS = 1 << 17
_BATCH_ROWS = 1 << 9
_PAIR_TOKENS = 1 << 18
_PARTS, _WORD, _SINGLE, _PAIR, _TRIPLE, _NEW = range(6)
_SINGLES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_PAIRS = ((0x3040, 0x30FF), (0x31F0, 0x31FF))
_TRIPLES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))
_STEP = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_WORD64 = 1 << 64
_HASH_BITS = 48


def normal(text: str) -> str:
    """A text as it is compared: NFKC, no case, only the first characters of a long one."""
    if text.isascii():
        return text[:MAX_CHARACTERS].lower()
    return unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).casefold()[: 2 * MAX_CHARACTERS]


def mixed(x: Array) -> Array:
    """Numbers far apart for neighbours (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= code <= last for first, last in ranges)


def kind_of(code: int) -> int:
    """Whether a character is of a word, stands alone, or parts words."""
    category = unicodedata.category(chr(code))
    if category == "So":
        return _SINGLE
    if category[0] not in "LNM":
        return _PARTS
    for kind, ranges in ((_SINGLE, _SINGLES), (_PAIR, _PAIRS), (_TRIPLE, _TRIPLES)):
        if _within(code, ranges):
            return kind
    return _WORD


class Words:
    """Makes bags of texts, many at once."""

    def __init__(self) -> None:
        self._kinds = np.full(0x110000, _NEW, np.uint8)
        self._values = mixed(np.arange(1, 0x110001, dtype=np.uint64) * np.uint64(_STEP))
        self._powers = np.ones(1, np.uint64)
        self._inverses = np.ones(1, np.uint64)

    def bags(self, normals: list[str]) -> tuple[Array, Array]:
        """The members of each text's bag, text after text, and how many each has."""
        codes = self._codes(" ".join(normals))
        kinds = self._kinds_of(codes)
        begins = np.cumsum([0, *(len(t) + 1 for t in normals)], dtype=np.int64)
        at, hashes = self._words(codes, kinds)
        rows = (np.searchsorted(begins, at, side="right") - 1).astype(np.uint64)
        keys = np.sort((rows << np.uint64(_HASH_BITS)) | (mixed(hashes) >> np.uint64(64 - _HASH_BITS)))
        place = np.arange(len(keys))
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        earlier = place - np.maximum.accumulate(np.where(is_first, place, 0))
        counts = np.bincount((keys >> np.uint64(_HASH_BITS)).astype(np.int64), minlength=len(normals))
        word = keys & np.uint64((1 << _HASH_BITS) - 1)
        return mixed(word + earlier.astype(np.uint64) * np.uint64(_STEP)), counts

    def _codes(self, text: str) -> Array:
        if text.isascii():
            return np.frombuffer(text.encode("ascii"), np.uint8)
        return np.frombuffer(text.encode("utf-32-le"), np.uint32)

    def _kinds_of(self, codes: Array) -> Array:
        kinds = self._kinds[codes]
        if (kinds == _NEW).any():
            for code in np.unique(codes[kinds == _NEW]).tolist():
                self._kinds[code] = kind_of(code)
            kinds = self._kinds[codes]
        return kinds

    def _words(self, codes: Array, kinds: Array) -> tuple[Array, Array]:
        """Where each word begins, and its hash: the same wherever it stands."""
        is_word = np.zeros(len(kinds) + 2, np.int8)
        is_word[1:-1] = kinds == _WORD
        edges = np.diff(is_word)
        begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        values = self._values[codes]
        self._grow(len(codes))
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(values * self._powers[: len(codes)], out=sums[1:])
        hashes = (sums[end] - sums[begin]) * self._inverses[begin]
        alone = np.flatnonzero(kinds > _WORD)
        if not len(alone):
            return begin, hashes
        return np.concatenate((begin, alone)), np.concatenate((hashes, self._grams(values, kinds, alone)))

    def _grams(self, values: Array, kinds: Array, at: Array) -> Array:
        grams = values[at].copy()
        kind, same = kinds[at], np.ones(len(at), bool)
        for step, least in ((1, _PAIR), (2, _TRIPLE)):
            after = np.minimum(at + step, len(kinds) - 1)
            same &= (kind >= least) & (at + step < len(kinds)) & (kinds[after] == kind)
            grams += np.where(same, values[after] * np.uint64(pow(_STEP, step, _WORD64)), np.uint64(0))
        return grams

    def _grow(self, size: int) -> None:
        """Powers of the step and of its inverse, modulo 2^64."""
        if len(self._powers) < size:
            inverse = pow(_STEP, -1, _WORD64)
            for name, factor in (("_powers", _STEP), ("_inverses", inverse)):
                factors = np.full(size, factor, np.uint64)
                factors[0] = 1
                setattr(self, name, np.multiply.accumulate(factors))


class Bags:
    """Bags of chosen rows, numbered in order; read again when two are compared."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file = path.open("w+b", buffering=0)
        self._begins = np.zeros(1, np.int64)
        self._words = Words()

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()
        self._path.unlink()

    def fill(self, spool: Spool, chosen: Array, tell: Callable[[int], None]) -> Iterator[tuple[Array, Array]]:
        """Writes the bags of the rows that are chosen; gives the members of some at a time, and how many each has."""
        counted = [np.zeros(1, np.int64)]
        said: list[str] = []
        characters = 0
        for at, line in enumerate(spool.lines()):
            if not chosen[at]:
                continue
            said.append(normal("\n".join(text for _, text in texts(orjson.loads(line)))))
            characters += len(said[-1])
            if characters >= _BATCH_CHARACTERS or len(said) >= _BATCH_ROWS:
                yield self._add(said, counted)
                said, characters = [], 0
                tell(at)
        if said:
            yield self._add(said, counted)
        self._begins = np.cumsum(np.concatenate(counted))

    def _add(self, said: list[str], counted: list[Array]) -> tuple[Array, Array]:
        members, counts = self._words.bags(said)
        self._file.write((members >> np.uint64(32)).astype(np.uint32).tobytes())
        counted.append(counts)
        return members, counts

    def sizes(self, numbers: Array) -> Array:
        """How many members each has."""
        return self._begins[numbers + 1] - self._begins[numbers]

    def are_similar(self, ones: Array, others: Array, similarity: float) -> Array:
        """Whether the Jaccard similarity of each pair is at least that."""
        sizes, other_sizes = self.sizes(ones), self.sizes(others)
        similar = np.minimum(sizes, other_sizes) >= similarity * np.maximum(sizes, other_sizes)  # else they cannot be
        asked = np.flatnonzero(similar)
        ends = np.cumsum((sizes + other_sizes)[asked])
        begin = 0
        while begin < len(asked):
            taken = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, taken + _PAIR_TOKENS, side="right")))
            these = asked[begin:end]
            both = self._shared(ones[these], others[these])
            similar[these] = both >= similarity * (sizes[these] + other_sizes[these] - both) - 1e-9
            begin = end
        return similar

    def _shared(self, ones: Array, others: Array) -> Array:
        """How many members each pair has in common."""
        numbers = np.concatenate((ones, others))
        read: dict[int, Array] = {}
        for number in np.unique(numbers).tolist():
            begin, end = int(self._begins[number]), int(self._begins[number + 1])
            read[number] = np.frombuffer(os.pread(self._file.fileno(), 4 * (end - begin), 4 * begin), np.uint32)
        pairs = np.tile(np.arange(len(ones), dtype=np.uint64), 2)
        members = np.concatenate([read[n] for n in numbers.tolist()]).astype(np.uint64)
        keys = np.sort((np.repeat(pairs, self.sizes(numbers)) << np.uint64(32)) | members)
        twice = keys[1:][keys[1:] == keys[:-1]]
        return np.bincount((twice >> np.uint64(32)).astype(np.int64), minlength=len(ones))
