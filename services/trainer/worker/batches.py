"""Which rows go into which micro-batch of which step.

Law of this room: a function of ledger, seed and settings alone; no torch, no
state. A micro-batch is the numbers of its rows; a step never crosses an epoch,
so an epoch is exactly one pass over the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.common.packing import Rows, pack


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
    _epochs: dict[int, list[Rows]] = field(default_factory=dict)

    def epoch(self, number: int) -> list[Rows]:
        """The micro-batches of an epoch; only the newest is remembered."""
        if number not in self._epochs:
            order = np.random.Generator(np.random.PCG64([self.seed, number])).permutation(len(self.lengths)).tolist()
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


def rate(step: int, total: int, kind: str, warmup: int, full: float) -> float:
    """The learning rate of a step: straight up over the warm-up, then the course."""
    if step <= warmup:
        return full * step / (warmup + 1)
    done = (step - warmup - 1) / max(1, total - warmup)
    if kind == "LINEAR":
        return full * (1.0 - done)
    if kind == "COSINE":
        return full * 0.5 * (1.0 + math.cos(math.pi * done))
    return full
