"""Keys and values of every row in flight, in slots of one tensor a layer.

Law of this room: active rows lie in slots 0 … n-1 without a gap, so a step works
on a slice and gathers nothing. A row's tokens lie at positions 0 … length-1 of
its slot; what lies behind is garbage that the mask hides. Stands behind
transformers' model code as a `Cache`, so every family that attends by keys and
values works.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache

_FIRST_CAPACITY = 256


@dataclass(slots=True)
class Window:
    """Where one forward reads and writes: slots first … first+rows, each from its own start."""

    first: int
    starts: torch.Tensor
    """Position of the first new token of each row."""
    tokens: int
    """New tokens a row; above 1 only for a single row."""
    span: int
    """Positions that the longest row has after this forward."""


class SlotCache(Cache):
    """Slots for rows. Grows by doubling; gives everything back when no row is left."""

    def __init__(self, max_rows: int, context_tokens: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._max_rows = max_rows
        self._context = context_tokens
        self._device = device
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows = 1
        self._capacity = min(_FIRST_CAPACITY, context_tokens)
        self._window = Window(0, torch.zeros(1, dtype=torch.long), 1, 1)

    @property
    def bytes_held(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in (*self._keys.values(), *self._values.values()))

    def open(self, first: int, starts: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepares one forward; returns position ids [rows, tokens] and the mask [rows, 1, tokens, span]."""
        span = max(starts) + tokens
        self._reserve(first + len(starts), span)
        begin = torch.tensor(starts, dtype=torch.long, device=self._device)
        self._window = Window(first, begin, tokens, span)
        positions = begin[:, None] + torch.arange(tokens, device=self._device)
        mask = torch.arange(span, device=self._device)[None, None, None, :] <= positions[:, None, :, None]
        return positions, mask

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the model's attention: stores the new tokens, returns all that the rows may see."""
        w = self._window
        keys = self._store(self._keys, key_states, layer_idx, w)
        values = self._store(self._values, value_states, layer_idx, w)
        return keys, values

    def _store(self, held: dict[int, torch.Tensor], new: torch.Tensor, layer: int, w: Window) -> torch.Tensor:
        rows, heads, tokens, width = new.shape
        if layer not in held:
            held[layer] = new.new_zeros((self._rows, heads, self._capacity, width))
        slots = held[layer][w.first : w.first + rows]
        if tokens == 1:
            slots[torch.arange(rows, device=new.device), :, w.starts] = new[:, :, 0]
        else:
            begin = w.span - tokens
            slots[0, :, begin : w.span] = new[0]
        return slots[:, :, : w.span]

    def move(self, source: int, target: int, length: int) -> None:
        """Puts a row into another slot."""
        for held in (self._keys, self._values):
            for tensor in held.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def scrub(self, slot: int) -> None:
        """Sets a slot to zero: a mask hides garbage, but not what is not a number."""
        for held in (self._keys, self._values):
            for tensor in held.values():
                tensor[slot].zero_()

    def clear(self) -> None:
        """Gives all slots back."""
        self._keys.clear()
        self._values.clear()
        self._rows = 1
        self._capacity = min(_FIRST_CAPACITY, self._context)

    def _reserve(self, rows: int, tokens: int) -> None:
        if rows <= self._rows and tokens <= self._capacity:
            return
        while self._rows < rows:
            self._rows = min(self._rows * 2, self._max_rows)
        while self._capacity < tokens:
            self._capacity = min(self._capacity * 2, self._context)
        for held in (self._keys, self._values):
            for layer, old in held.items():
                fresh = old.new_zeros((self._rows, old.shape[1], self._capacity, old.shape[3]))
                fresh[: old.shape[0], :, : old.shape[2]] = old
                held[layer] = fresh

    # What some model code asks of a cache. The mask is made here, so these only have to be true.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.span - self._window.tokens

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self._window.span, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self._context

    def get_max_length(self, layer_idx=None) -> int:
        return self._context

    def has_previous_state(self, layer_idx=None, state_idx=None) -> bool:
        return self._window.span > self._window.tokens

    def __len__(self) -> int:
        return len(self._keys)
