"""One forward: the new tokens of every row, laid end to end.

Law of this room: says which token belongs to which row, place, position and adapter, and
which logits are wanted; computes nothing of the model. Rows with one new token come first,
in the order of lanes and slots, so that they are attended together; then the others, the shortest
first. On a processor a few tokens that belong to nobody may follow, so that few different numbers
of tokens are met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from services.inference.worker.lanes import Lane, Place

_ROUND = 64
"""Spans are rounded up to this, so that the libraries meet few different lengths."""
_USUAL = ((64, 16), (128, 32), (256, 64), (512, 128), (2048, 256))
"""So many tokens are rounded up to a multiple of that. A new number costs a processor as much as some steps."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one row."""

    place: Place
    ids: Sequence[int]
    adapter: str
    logits: int = 1
    """Of how many of its last tokens logits are wanted."""


@dataclass(frozen=True, slots=True)
class Together:
    """Rows of one lane with one new token each: tokens begin … end of the forward."""

    lane: Lane
    begin: int
    end: int
    slots: slice | torch.Tensor
    numbers: torch.Tensor
    """The slots, one by one."""
    starts: torch.Tensor
    at: int
    """Where every row begins; -1 where they differ."""
    span: int
    ends: tuple[int, ...]
    """Positions that each row has after this forward."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Several new tokens of one row: tokens begin … end of the forward."""

    place: Place
    begin: int
    end: int
    start: int


@dataclass(slots=True)
class Flat:
    """Everything that a forward needs to know. Made by `lay`."""

    ids: torch.Tensor
    positions: torch.Tensor
    adapters: tuple[str, ...]
    """Of the rows with one new token, in order."""
    pieces: tuple[tuple[int, int, str], ...]
    """Begin, end and adapter of the others."""
    together: tuple[Together, ...]
    alone: tuple[Alone, ...]
    picked: torch.Tensor | None
    """Tokens whose logits are wanted; None = all."""
    order: tuple[int, ...]
    """Which of the given pieces the rows of logits belong to, a piece as often as it wants logits."""
    masks: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict)
    """Made once a forward, used by every layer; by number of the group and window."""

    def mask(self, number: int, window: int, make: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The mask of a group, made when first asked for."""
        key = (number, window)
        if key not in self.masks:
            self.masks[key] = make()
        return self.masks[key]


def lay(pieces: Sequence[Piece], device: torch.device) -> Flat:
    """Lays pieces end to end. Does not move the places' lengths on: see `settle`."""
    order = sorted(range(len(pieces)), key=lambda n: _place_in_line(pieces[n]))
    ids: list[int] = []
    positions: list[int] = []
    picked: list[int] = []
    whose: list[int] = []
    adapters: list[str] = []
    long: list[tuple[int, int, str]] = []
    together: list[Together] = []
    alone: list[Alone] = []
    group: list[Piece] = []
    for number in order:
        piece = pieces[number]
        begin, start, count = len(ids), piece.place.length, len(piece.ids)
        ids.extend(piece.ids)
        positions.extend(range(start, start + count))
        picked.extend(range(begin + count - piece.logits, begin + count))
        whose.extend([number] * piece.logits)
        if group and (count > 1 or piece.place.lane is not group[0].place.lane):
            together.append(_together(group, begin, device))
            group = []
        if count == 1:
            group.append(piece)
            adapters.append(piece.adapter)
        else:
            long.append((begin, begin + count, piece.adapter))
            alone.append(Alone(piece.place, begin, begin + count, start))
    if group:
        together.append(_together(group, len(ids), device))
    if alone and device.type == "cpu":
        ids += [0] * (missing := _missing(len(ids)))
        positions += [0] * missing
    return Flat(
        torch.tensor(ids, dtype=torch.long, device=device),
        torch.tensor(positions, dtype=torch.long, device=device),
        tuple(adapters),
        tuple(long),
        tuple(together),
        tuple(alone),
        None if len(picked) == len(ids) else torch.tensor(picked, dtype=torch.long, device=device),
        tuple(whose),
    )


def settle(pieces: Sequence[Piece]) -> None:
    """After the forward: the tokens are in their places."""
    for piece in pieces:
        piece.place.length += len(piece.ids)


def around(begin: int, end: int, tokens: int) -> tuple[int, int]:
    """Tokens that hold begin … end, of those there are, and whose number is a usual one if it can be."""
    count = min(end - begin + _missing(end - begin), tokens)
    low = min(begin, tokens - count)
    return low, low + count


def fitting(tokens: int) -> int:
    """The largest usual number of tokens that is not more than this."""
    return next((tokens - tokens % step for most, step in _USUAL if tokens < most + step), _USUAL[-1][0])


def _missing(tokens: int) -> int:
    """Tokens up to the next usual number; libraries prepare themselves anew for each number they meet."""
    usual = next((step for most, step in _USUAL if tokens <= most), _USUAL[-1][1])
    return -tokens % usual


def _place_in_line(piece: Piece) -> tuple[int, int, int]:
    return len(piece.ids), piece.place.lane.capacity, piece.place.slot


def _together(group: list[Piece], end: int, device: torch.device) -> Together:
    slots = [piece.place.slot for piece in group]
    starts = [piece.place.length for piece in group]
    lane, longest = group[0].place.lane, max(starts) + 1
    equal = min(starts) + 1 == longest
    span = longest if equal else min(lane.capacity, longest + -longest % _ROUND)
    run = slots[-1] - slots[0] + 1 == len(slots)
    numbers = torch.tensor(slots, dtype=torch.long, device=device)
    where = slice(slots[0], slots[-1] + 1) if run else numbers
    own = torch.tensor(starts, dtype=torch.long, device=device)
    at, ends = starts[0] if equal else -1, tuple(start + 1 for start in starts)
    return Together(lane, end - len(group), end, where, numbers, own, at, span, ends)
