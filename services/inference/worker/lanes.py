"""Keys and values of every row in flight, in slots of equal length side by side.

Law of this room: a row's place is as long as the row can ever get, so nothing grows or is
refused in mid-answer, and the bytes are known before a row begins. Places of one lane have
the same length and lie in slots 0 … n-1 without a gap: a row that leaves is replaced by the
last. What lies behind a row's tokens is finite garbage that a mask hides.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass, field

import torch

_SHORTEST = 128
"""Length of the shortest lane; each other is twice as long as the one before."""
_LARGE = 2**20
"""Bytes from which memory is taken from the system itself."""
_AT_FIRST = 8
"""Slots that a lane begins with, if they take no more bytes than may be kept for the next."""
_IDLE = 256 * 2**20
"""Bytes that no row has and that are kept for the next, where there is no limit; else a quarter of that."""


@dataclass(slots=True, eq=False)
class Place:
    """Where one row's keys and values are. Its slot may change when others leave."""

    lane: Lane
    slot: int
    length: int = 0
    """Tokens whose keys and values are there."""


@dataclass(slots=True, eq=False)
class Lane:
    """Slots of one length."""

    capacity: int
    keys: list[torch.Tensor] = field(default_factory=list)
    """Of each layer: [slots, heads, capacity, width]."""
    values: list[torch.Tensor] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    slots: int = 0


class Lanes:
    """All places of one model."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, limit: int) -> None:
        """`shapes`: heads and width of each layer's keys; `limit`: bytes of all places, 0 = no bound."""
        self._shapes, self._dtype, self._device, self._limit = shapes, dtype, device, limit
        size = torch.empty((), dtype=dtype).element_size()
        self.token_bytes = 2 * size * sum(heads * width for heads, width in shapes)
        self._lanes: dict[int, Lane] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of all places, in use or not."""
        return self.token_bytes * sum(lane.slots * lane.capacity for lane in self._lanes.values())

    @property
    def bytes_used(self) -> int:
        """Bytes of the places that rows have."""
        return self.token_bytes * sum(len(lane.places) * lane.capacity for lane in self._lanes.values())

    def bytes_for(self, tokens: int) -> int:
        """What a place for so many tokens takes."""
        return self.token_bytes * _capacity(tokens)

    @property
    def limit(self) -> int:
        return self._limit

    def take(self, tokens: int) -> Place | None:
        """A place for a row of at most so many tokens; None if there is no room for it now."""
        capacity = _capacity(tokens)
        if self._limit and self.bytes_used + self.token_bytes * capacity > self._limit:
            return None
        lane = self._lanes.get(capacity) or Lane(capacity)
        if len(lane.places) == lane.slots:
            self._trim(self.token_bytes * capacity, lane)
            try:
                self._resize(lane, self._wider(lane))
            except (MemoryError, OSError, RuntimeError):  # torch's own word for it is a RuntimeError
                return None
        self._lanes[capacity] = lane
        place = Place(lane, len(lane.places))
        lane.places.append(place)
        return place

    def give(self, place: Place) -> None:
        """Takes a place back; the last of its lane moves there."""
        lane, last = place.lane, place.lane.places[-1]
        if last is not place:
            for held in (*lane.keys, *lane.values):
                held[place.slot, :, : last.length] = held[last.slot, :, : last.length]
            lane.places[place.slot] = last
            last.slot = place.slot
        lane.places.pop()
        if self.bytes_held - self.bytes_used > (self._limit // 4 if self._limit else _IDLE):
            self._shrink(lane)

    def scrub(self, place: Place) -> None:
        """Sets a place to zero: a mask hides garbage, but not what is not a number."""
        for held in (*place.lane.keys, *place.lane.values):
            held[place.slot].zero_()

    def _wider(self, lane: Lane) -> int:
        """Slots for one more row: some, then twice as many, or as many as there are bytes for.

        More of them means that what is in the others moves, and all rows wait for that.
        """
        some = min(_AT_FIRST, max(1, _IDLE // (self.token_bytes * lane.capacity)))
        slots = 2 * lane.slots or some
        if self._limit:
            free = (self._limit - self.bytes_held) // (self.token_bytes * lane.capacity)
            slots = max(lane.slots + 1, min(slots, lane.slots + free))
        return slots

    def _shrink(self, lane: Lane) -> None:
        """Gives back what a lane has without need; a few slots it keeps, since new memory is slow."""
        if not lane.places:
            del self._lanes[lane.capacity]
        elif 4 * len(lane.places) <= lane.slots:
            self._resize(lane, lane.slots // 2)

    def _trim(self, needed: int, but: Lane) -> None:
        """Takes from other lanes the slots that no row has, if what is needed would not fit beside them."""
        if self._limit and self.bytes_held + needed > self._limit:
            for lane in list(self._lanes.values()):
                if lane is not but and not lane.places:
                    del self._lanes[lane.capacity]
                elif lane is not but and len(lane.places) < lane.slots:
                    self._resize(lane, len(lane.places))

    def _resize(self, lane: Lane, slots: int) -> None:
        longest, rows = max((p.length for p in lane.places), default=0), len(lane.places)
        shapes = [(slots, heads, lane.capacity, width) for heads, width in self._shapes]
        # Zeros, and not whatever was there: what a mask hides must still be a number.
        whole = _zeros(2 * sum(map(math.prod, shapes)), self._dtype, self._device)
        parts = iter(whole.split([math.prod(shape) for shape in (*shapes, *shapes)]))
        keys, values = ([next(parts).view(shape) for shape in shapes] for _ in range(2))
        if rows:
            for held, fresh in ((lane.keys, keys), (lane.values, values)):
                for before, now in zip(held, fresh, strict=True):
                    now[:rows, :, :longest] = before[:rows, :, :longest]
        lane.keys, lane.values, lane.slots = keys, values, slots


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a processor memory that is not there before it is written to: setting all of it to zero at once
    takes longer than many steps, and others would wait. So do large pages, of which the first token takes one for
    each layer; reading is no quicker with them."""
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(count, dtype=dtype, device=device)
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            held.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(held, dtype=dtype)


def _capacity(tokens: int) -> int:
    capacity = _SHORTEST
    while capacity < tokens:
        capacity *= 2
    return capacity
