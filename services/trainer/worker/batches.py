"""Which rows go into which micro-batch of which step.

Law of this room: a function of ledger, seed and settings alone; no torch, no
state. A micro-batch is the numbers of its rows; a step never crosses an epoch,
so an epoch is exactly one pass over the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.common.packing import Rows, pack

LIKE = 0.2
"""Lengths that differ by less than this share may meet in a micro-batch."""
LOOKED_AT = 1000
"""Epochs whose steps are measured when their size is chosen."""


def pad(order: Sequence[int], lengths: Sequence[int], room: int) -> list[Rows]:
    """Rows in order, as many as fit when padded to the longest."""
    batches: list[Rows] = []
    rows: list[int] = []
    longest = 0
    for row in order:
        widest = max(longest, int(lengths[row]))
        if rows and widest * (len(rows) + 1) > room:
            batches.append(tuple(rows))
            rows, widest = [], int(lengths[row])
        rows.append(row)
        longest = widest
    return [*batches, tuple(rows)] if rows else batches


def group(draw: np.random.Generator, order: Sequence[int], lengths: Sequence[int], room: int) -> list[Rows]:
    """Rows of like length under one another; the micro-batches are then shuffled.

    Each length is seen a little longer than it is, by chance, so that other rows
    meet in the next epoch.
    """
    seen = {row: int(lengths[row]) * (1 + LIKE * draw.random()) for row in order}
    batches = pad(sorted(order, key=seen.__getitem__), lengths, room)
    return [batches[n] for n in draw.permutation(len(batches))]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the optimiser."""

    number: int
    """From 1."""
    epoch: int
    """From 0."""
    index: int
    """Within the epoch, from 0."""
    of: int
    """Steps of the epoch."""
    micro_batches: tuple[Rows, ...]


@dataclass(slots=True)
class Plan:
    """Every step of a run."""

    lengths: Sequence[int]
    seed: int
    packing: bool
    room: int
    per_step: int
    """Micro-batches of one step, over all ranks."""
    max_steps: int
    epochs: float
    grouped: bool = False
    """Where packing is off: rows of like length share a micro-batch."""
    _epochs: dict[int, list[Rows]] = field(default_factory=dict)

    def epoch(self, number: int) -> list[Rows]:
        """The micro-batches of an epoch; only the newest is remembered."""
        if number not in self._epochs:
            draw = np.random.Generator(np.random.PCG64([self.seed, number]))
            order = draw.permutation(len(self.lengths)).tolist()
            if self.grouped and not self.packing:
                made = group(draw, order, self.lengths, self.room)
            else:
                made = (pack if self.packing else pad)(order, self.lengths, self.room)
            self._epochs.clear()
            self._epochs[number] = made
        return self._epochs[number]

    def steps_of(self, number: int) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.epoch(number)) / self.per_step)

    def total_steps(self) -> int:
        """Steps in all."""
        if self.max_steps:
            return self.max_steps
        whole = math.floor(self.epochs)
        rest = self.epochs - whole
        steps = sum(self.steps_of(n) for n in range(whole))
        return max(1, steps + (round(rest * self.steps_of(whole)) if rest else 0))

    def steps(self, total: int, after: int = 0) -> Iterator[Step]:
        """Steps after a number, in order, up to `total`."""
        number = epoch = 0
        while number < total:
            of = self.steps_of(epoch)
            if number + of <= after:
                number, epoch = number + of, epoch + 1
                continue
            micro_batches = self.epoch(epoch)
            for index in range(of):
                number += 1
                if after < number <= total:
                    chosen = micro_batches[index * self.per_step : (index + 1) * self.per_step]
                    yield Step(number, epoch, index, of, tuple(chosen))
            epoch += 1

    def efficiency(self) -> float:
        """Share of token places of the first epoch that hold a real token."""
        batches = self.epoch(0)
        real = sum(int(self.lengths[r]) for rows in batches for r in rows)
        if self.packing:
            return real / (len(batches) * self.room)
        return real / sum(max(int(self.lengths[r]) for r in rows) * len(rows) for rows in batches)


def per_step_of(plan: Plan, tokens: int, ranks: int) -> tuple[int, bool]:
    """The fewest micro-batches, a multiple of `ranks`, of which every step has at least so many tokens.

    The last step of an epoch has what is left; LOOKED_AT epochs are looked at. False
    where a whole epoch has too few tokens: then it is one step.
    """
    sums: dict[int, list[int]] = {}

    def at(epoch: int) -> list[int]:
        if epoch not in sums:
            sums[epoch] = [sum(int(plan.lengths[r]) for r in rows) for rows in plan.epoch(epoch)]
        return sums[epoch]

    enough = sum(at(0)) >= tokens
    rounds = math.ceil(tokens / (max(at(0)) * ranks) if enough else len(at(0)) / ranks)
    while not _fills(plan, at, rounds * ranks, tokens):
        rounds += 1
    return rounds * ranks, enough


def _fills(plan: Plan, at: Callable[[int], list[int]], per_step: int, tokens: int) -> bool:
    """Whether every step but the last of an epoch has so many tokens; so has it where an epoch is one step."""
    steps = 0
    for epoch in range(LOOKED_AT if plan.max_steps else min(LOOKED_AT, math.ceil(plan.epochs))):
        sizes = at(epoch)
        for begin in range(0, len(sizes) - per_step, per_step):
            if plan.max_steps and steps + begin // per_step >= plan.max_steps:
                break  # the run does not come so far
            if sum(sizes[begin : begin + per_step]) < tokens:
                return False
        steps += math.ceil(len(sizes) / per_step)
        if plan.max_steps and steps >= plan.max_steps:
            break
    return True
