"""Several rows in one sequence: how they are packed, and how many sequences that makes.

Law of this room: pure. The trainer packs with what stands here, and ledger and
measure forecast with it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

OPEN_BINS = 64
Rows = tuple[int, ...]


def pack(order: Sequence[int], lengths: Sequence[int], room: int) -> list[Rows]:
    """Best fit with a bounded number of open bins: rows in order, each into the fullest bin it fits."""
    done: list[list[int]] = []
    open_bins: list[tuple[int, list[int]]] = []  # (free places, rows)
    for row in order:
        need = int(lengths[row])
        fits = [n for n, (free, _) in enumerate(open_bins) if free >= need]
        if fits:
            best = min(fits, key=lambda n: open_bins[n][0])
            free, rows = open_bins[best]
            rows.append(row)
            open_bins[best] = (free - need, rows)
            continue
        if len(open_bins) == OPEN_BINS:
            fullest = min(range(len(open_bins)), key=lambda n: open_bins[n][0])
            done.append(open_bins.pop(fullest)[1])
        open_bins.append((room - need, [row]))
    return [tuple(rows) for rows in [*done, *(rows for _, rows in open_bins)]]


def forecast(counts: Mapping[int, int], room: int) -> int:
    """Sequences that best fit makes of the longest rows first; `counts` says how many rows have a length.

    Works on lengths, not on rows, so a million rows take no longer than their
    different lengths. No length may be above `room`. What the trainer makes of
    shuffled rows may be a little more.
    """
    free: list[int] = []  # free places of open sequences, rising
    held: dict[int, int] = {}  # and how many have so many
    sequences = 0

    def put(places: int, many: int) -> None:
        if many:
            if places not in held:
                bisect.insort(free, places)
            held[places] = held.get(places, 0) + many

    for length in sorted((n for n in counts if n > 0), reverse=True):
        left = counts[length]
        while left:
            at = bisect.bisect_left(free, length)
            if at == len(free):
                places, there = room, left
            else:
                places = free[at]
                there = held[places]
            fit = places // length  # into the fullest that has room, again and again
            full = min(there, left // fit)
            rest = left - full * fit if full < there else 0
            if at < len(free):
                held[places] -= full + bool(rest)
                if not held[places]:
                    del held[places], free[at]
            else:
                sequences += full + bool(rest)
            put(places - fit * length, full)
            put(places - rest * length, bool(rest))
            left -= full * fit + rest
    return sequences


def fill(tokens: int, sequences: int, room: int) -> float:
    """Share of sequences that holds tokens."""
    return tokens / (sequences * room) if sequences else 0.0
