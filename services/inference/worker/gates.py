"""The gates of a layer of Llama's kind: silu(gate x) * (up x), with the adapters at both.

Law of this room: where the weights can do more than multiply (see reordered), the two stand apart, and without
adapters the whole is two products; else they are one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from services.inference.worker import linears
from services.inference.worker.lora import Lora
from services.inference.worker.reordered import Reordered


class Gates:
    """Of one layer; `name` is that of the module that has both."""

    def __init__(self, name: str, owner: Any, lora: Lora) -> None:
        gate, up = owner.gate_proj, owner.up_proj
        self._lora = lora
        self._weights = (gate.whole, up.whole) if isinstance(gate, Reordered) and isinstance(up, Reordered) else None
        self._joined = linears.of([gate, up]) if self._weights is None else None
        self._site = lora.site(f"{name}.gate_proj", f"{name}.up_proj", apart=self._weights is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._weights is not None:
            return self._lora.gated(self._site, *self._weights, x)
        assert self._joined is not None
        both = self._lora.through(self._site, self._joined, x)
        half = both.shape[-1] // 2
        return functional.silu(both[:, :half]) * both[:, half:]
