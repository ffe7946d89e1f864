"""The matrices of several adapters side by side at one site.

Law of this room: knows tensors, not requests. Of all adapters at a site the A are one matrix and the B another; who
must not colour a token is silenced between the two. Modules of a site each have their own columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from services.inference.worker.reordered import Weights

LARGEST = 1e28
"""No number of an A may be larger: what it makes of another's token must be a number, since it is silenced by a
product with zero."""
_EMPTY = 300_000
"""Numbers of empty corners in a matrix that several modules become: one product costs less than two and these."""
_OFTEN = 8
"""Uses after which a matrix is reordered."""


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter at one module; scaling and gain are in `b`."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    more: torch.Tensor | None = None  # [out], gain - 1, fp32

    def to(self, device: torch.device) -> Part:
        more = None if self.more is None else self.more.to(device)
        return Part(self.a.to(device), self.b.to(device), more)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.more is None else self.more.nbytes)


class Silence:
    """Which columns each token keeps: [tokens, columns]."""

    def __init__(self, own: torch.Tensor) -> None:
        self._own = own
        self.foreign = ~own
        self._factors: dict[torch.dtype, torch.Tensor] = {}

    def factors(self, dtype: torch.dtype) -> torch.Tensor:
        """One where a column is the token's own, else zero."""
        if dtype not in self._factors:
            self._factors[dtype] = self._own.to(dtype)
        return self._factors[dtype]


class Matrix:
    """A matrix that is reordered once it has been used a few times: doing so costs as much as some uses."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._uses = 0
        self._quick: Weights | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._quick is not None:
            return self._quick(x)
        self._uses += 1
        if self._uses == _OFTEN and self._weight.dtype == torch.bfloat16 and self._weight.device.type == "cpu":
            self._quick = Weights(self._weight, None)
        return functional.linear(x, self._weight)

    def silenced(self, x: torch.Tensor, silence: Silence | None) -> torch.Tensor:
        """The product; zero where it is another's."""
        if silence is None:
            return self(x)
        if self._quick is not None:
            return self._quick.times(x, silence.factors(x.dtype))
        return self(x).masked_fill_(silence.foreign, 0.0)

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`there` and the product; a new tensor."""
        return self._quick.onto(x, there) if self._quick is not None else there + self(x)


@dataclass(frozen=True, slots=True)
class Change:
    """Modules of a site that lie side by side and are changed together."""

    low: int
    high: int
    """Ranks from, to."""
    start: int
    end: int
    """Outputs from, to."""
    b: Matrix
    """[outputs, ranks]; of several modules, each has its own corner."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Several adapters side by side at one site."""

    a: Matrix | None
    """[all ranks of all modules, in]; None where none of them changes this site."""
    changes: tuple[Change, ...]
    columns: tuple[int, ...]
    """Whose each rank is, as a place in the line of adapters."""
    has_more: bool

    def add(self, inner: torch.Tensor, out: torch.Tensor, first: int = 0) -> None:
        """Adds what B makes of `inner`, from its token `first` on."""
        for change in self.changes:
            own = out[:, change.start : change.end]
            made = change.b(inner[:, change.low : change.high])
            own += made if len(made) == len(own) else made[first : first + len(own)]


def stacked(
    line: Sequence[Mapping[str, Part]], names: Sequence[str], starts: Sequence[int], apart: bool = False
) -> Stack:
    """The parts of adapters in line at the modules of a site, whose outputs begin at `starts`.

    `apart`: each module is changed by itself.
    """
    a: list[torch.Tensor] = []
    corners: list[tuple[int, int, torch.Tensor]] = []
    columns: list[int] = []
    has_more = False
    for start, name in zip(starts, names, strict=True):
        there = [(place, part) for place, parts in enumerate(line) if (part := parts.get(name)) is not None]
        if not there:
            continue
        corners.append((len(columns), start, torch.cat([part.b for _, part in there], dim=1)))
        for place, part in there:
            a.append(part.a)
            columns.extend([place] * part.a.shape[0])
            has_more = has_more or part.more is not None
    first = Matrix(torch.cat(a)) if a else None
    return Stack(first, tuple(_changes(corners, apart)), tuple(columns), has_more)


def _changes(corners: list[tuple[int, int, torch.Tensor]], apart: bool) -> Iterator[Change]:
    """Modules whose outputs follow one another become one matrix, unless they are large."""
    group: list[tuple[int, int, torch.Tensor]] = []
    for corner in (*corners, None):
        if group and (corner is None or apart or not _joins(group, corner)):
            low, start = group[0][0], group[0][1]
            b = torch.block_diag(*(part for _, _, part in group)) if len(group) > 1 else group[0][2]
            yield Change(low, low + b.shape[1], start, start + b.shape[0], Matrix(b))
            group = []
        if corner is not None:
            group.append(corner)


def _joins(group: list[tuple[int, int, torch.Tensor]], corner: tuple[int, int, torch.Tensor]) -> bool:
    parts = [part for _, _, part in (*group, corner)]
    empty = sum(part.shape[0] for part in parts) * sum(part.shape[1] for part in parts) - sum(p.numel() for p in parts)
    return corner[1] == group[-1][1] + group[-1][2].shape[0] and empty <= _EMPTY
