"""Rows that are nearly equal, found by MinHash with its bands sorted on disk.

Law of this room: the same rows give the same groups, in any order; memory is
bounded but for some bytes a row. MinHash proposes pairs, the true similarity of
their bags of words (bags.py) decides, and what is near to one of a group is of
the group. Rows are known by content, never by place, so order changes nothing.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.datasets.worker.bags import Bags
from services.datasets.worker.spool import Spool

Array = npt.NDArray[Any]
Tell = Callable[[str, int, int], None]

PERMUTATIONS = 320
RECALL = 0.999
"""Of pairs at the similarity that was asked for; those above it are found more surely."""
STAGE = "near duplicates"
_SEED = 2026
_ROUNDS = 16
"""So many rows of a bucket are compared with all its others, or one of unlike rows would take for ever."""
_PART_ROWS = 1 << 20
_NO_WORDS = np.uint64(0)


@dataclass(frozen=True, slots=True)
class Bands:
    """How a signature is cut: rows that agree on a whole band are a pair to look at."""

    bands: int
    rows: int

    def recall(self, similarity: float) -> float:
        """The share of pairs of a similarity that agree on a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def bands_for(similarity: float, permutations: int = PERMUTATIONS, recall: float = RECALL) -> Bands:
    """The bands that meet the recall at a similarity, and propose the fewest needless pairs."""
    fit = (r for r in range(permutations, 0, -1) if Bands(permutations // r, r).recall(similarity) >= recall)
    rows = next(fit, 1)
    return Bands(permutations // rows, rows)


def groups(spool: Spool, keep: Array, similarity: float, scratch: pathlib.Path, tell: Tell) -> Array:
    """For every row the first row of its group; its own place where it is alone or not kept."""
    found = np.arange(spool.rows)
    places = np.flatnonzero(keep)
    if not len(places):
        return found
    contents = _contents(spool)[places]
    different, first, head_of = np.unique(contents, return_index=True, return_inverse=True)
    # Bags are written in order of place, and numbered so.
    by_place = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[by_place] = np.arange(len(first))
    contents, head_of = different[by_place], number[head_of]
    chosen = np.zeros(spool.rows, bool)
    chosen[places[first]] = True
    del different, first, by_place, number
    with contextlib.closing(Bags(scratch / "bags")) as bags:
        filled = bags.fill(spool, chosen, lambda done: tell(STAGE, done, 2 * spool.rows))
        paths = _write_bands(filled, bands_for(similarity), scratch)
        roots = np.arange(len(contents), dtype=np.int32)
        for n, path in enumerate(paths):
            for members, buckets in _buckets(path, contents):
                roots = _joined(bags, roots, members, buckets, similarity)
            path.unlink()
            tell(STAGE, spool.rows * (len(paths) + n + 1) // len(paths), 2 * spool.rows)
    group = roots[head_of]
    earliest = np.full(len(contents), spool.rows)
    np.minimum.at(earliest, group, places)
    found[places] = earliest[group]
    return found


def _contents(spool: Spool) -> Array:
    contents = np.empty(spool.rows, np.uint64)
    for block in spool.blocks():
        contents[block.first : block.first + len(block.entries)] = block.entries["content"][:, 0]
    return contents


def _write_bands(filled: Iterable[tuple[Array, Array]], cut: Bands, scratch: pathlib.Path) -> list[pathlib.Path]:
    """For each band a file with a hash for every bag, in order; 0 for a bag without words."""
    from rensa import RMinHash  # here, since most datasets need none of its memory

    paths = [scratch / f"band-{n}" for n in range(cut.bands)]
    odd = np.random.default_rng(_SEED).integers(0, 1 << 63, cut.rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(p.open("wb")) for p in paths]
        for members, counts in filled:
            ends = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
            told = RMinHash.digest_matrix_from_flat_token_hashes(members, ends, cut.bands * cut.rows, _SEED).to_rows()
            signatures = np.array(told, np.uint32).reshape(len(counts), cut.bands, cut.rows)
            hashes = (signatures * odd).sum(axis=2, dtype=np.uint64)
            hashes = (hashes ^ (hashes >> np.uint64(29))) | np.uint64(1)
            hashes[counts == 0] = _NO_WORDS
            for n, f in enumerate(files):
                f.write(hashes[:, n].tobytes())
    return paths


def _buckets(path: pathlib.Path, contents: Array) -> Iterator[tuple[Array, Array]]:
    """Bags that agree on a band, and the hash they share, by hash and content; one part of the band at a time."""
    parts = max(1, -(-len(contents) // _PART_ROWS))
    for part in range(parts):
        hashes, members = _part(path, part, parts)
        order = np.argsort(hashes)
        hashes, members = hashes[order], members[order]
        is_same = hashes[1:] == hashes[:-1]
        shared = np.zeros(len(hashes), bool)
        shared[1:] |= is_same
        shared[:-1] |= is_same
        shared &= hashes != _NO_WORDS
        hashes, members = hashes[shared], members[shared]
        order = np.lexsort((contents[members], hashes))
        yield members[order], hashes[order]


def _part(path: pathlib.Path, part: int, parts: int) -> tuple[Array, Array]:
    """The hashes of a part of a band, and whose they are."""
    hashes, members, first = [], [], 0
    with path.open("rb") as f:
        while data := f.read(8 * _PART_ROWS):
            some = np.frombuffer(data, np.uint64)
            mine = np.flatnonzero((some >> np.uint64(1)) % np.uint64(parts) == part)
            hashes.append(some[mine])
            members.append((mine + first).astype(np.int32))
            first += len(some)
    return np.concatenate(hashes), np.concatenate(members)


def _joined(bags: Bags, roots: Array, members: Array, buckets: Array, similarity: float) -> Array:
    """The roots after the near rows of every bucket were joined.

    The first row of each bucket is compared with all the others, and is done with. In a large bucket so are
    those that are near to it, or one of equal rows would take for ever.
    """
    for _ in range(_ROUNDS):
        if len(members) < 2:
            break
        is_first = np.concatenate(([True], buckets[1:] != buckets[:-1]))
        begins = np.flatnonzero(is_first)
        sizes = np.diff(np.append(begins, len(members)))
        leaders = np.repeat(members[begins], sizes)
        is_open = roots[leaders] != roots[members]
        asked = np.flatnonzero(is_open)
        is_near = np.zeros(len(members), bool)
        is_near[asked] = bags.are_similar(leaders[asked], members[asked], similarity)
        if is_near.any():
            for one, other in zip(leaders[is_near].tolist(), members[is_near].tolist(), strict=True):
                roots[_root(roots, one)] = _root(roots, other)
            roots = _flat(roots)
        # A bucket whose rows are all of one group has nothing left to find.
        is_mixed = np.logical_or.reduceat(roots[members] != roots[leaders], begins)
        stays = ~is_first & np.repeat(is_mixed, sizes) & (np.repeat(sizes <= _ROUNDS, sizes) | (is_open & ~is_near))
        members, buckets = members[stays], buckets[stays]
    return roots


def _root(roots: Array, member: int) -> int:
    while roots[member] != member:
        member = int(roots[member])
    return member


def _flat(roots: Array) -> Array:
    """Every member's root, without a way to it."""
    while not np.array_equal(above := roots[roots], roots):
        roots = above
    return roots
