"""Keys and values of prompts seen before, so that what is asked again need not be read again.

Law of this room: kept by blocks of tokens, each known by the adapter's digest and every token before it, so a
prompt never meets what another adapter, or another beginning, left. Those used longest ago make room. What is
kept is a copy: rows come and go without it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from services.inference.worker.lanes import Place

BLOCK = 64


@dataclass(frozen=True, slots=True)
class _Block:
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class Prefixes:
    """Blocks within a number of bytes; 0 = keeps nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        """Those used longest ago first."""
        self.bytes_held = 0
        self.hit_tokens = 0
        self.miss_tokens = 0

    def find(self, adapter: str, ids: Sequence[int], place: Place) -> int:
        """Puts what is known of a prompt into a fresh place; how many tokens. Leaves at least one to be read."""
        at = 0
        known_names = []
        for name in _names(adapter, ids[: len(ids) - 1]) if self._limit else ():
            block = self._blocks.get(name)
            if block is None:
                break
            known_names.append(name)
            for held, known in ((place.lane.keys, block.keys), (place.lane.values, block.values)):
                for layer, tensor in enumerate(known):
                    held[layer][place.slot, :, at : at + BLOCK] = tensor
            at += BLOCK
        self._touch(known_names)
        place.length = at
        self.hit_tokens += at
        self.miss_tokens += len(ids) - at
        return at

    def keep(self, adapter: str, ids: Sequence[int], place: Place) -> None:
        """Keeps what a place knows of tokens that it begins with."""
        if not self._limit:
            return
        names = list(_names(adapter, ids[: place.length]))
        self._touch([name for name in names if name in self._blocks])
        for number, name in enumerate(names):
            if name in self._blocks:
                continue
            part = slice(number * BLOCK, (number + 1) * BLOCK)
            keys, values = (tuple(t[place.slot, :, part].clone() for t in held)
                            for held in (place.lane.keys, place.lane.values))  # fmt: skip
            block = _Block(keys, values)
            if not self._make_room(block.nbytes, set(names)):
                break
            self._blocks[name] = block
            self.bytes_held += block.nbytes
        self._touch([name for name in names if name in self._blocks])

    def _touch(self, names: Sequence[bytes]) -> None:
        """Used now. The last of a beginning is the first to go: without those before it nobody would find it."""
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def _make_room(self, needed: int, own: set[bytes]) -> bool:
        """Lets go of what was used longest ago, but of nothing of one's own."""
        while self.bytes_held + needed > self._limit:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in own:
                return False
            self.bytes_held -= self._blocks.pop(oldest).nbytes
        return True

    def drop(self, adapter: str, ids: Sequence[int]) -> None:
        """Forgets a prompt that turned out unsound."""
        for name in _names(adapter, ids):
            if (block := self._blocks.pop(name, None)) is not None:
                self.bytes_held -= block.nbytes


def _names(adapter: str, ids: Sequence[int]) -> Iterator[bytes]:
    """What each whole block of a prompt is known by."""
    chain = hashlib.sha256(adapter.encode())
    for at in range(0, len(ids) - BLOCK + 1, BLOCK):
        chain.update(b"".join(i.to_bytes(4, "little") for i in ids[at : at + BLOCK]))
        yield chain.digest()
