"""Linear layers as the engine computes them.

Law of this room: a linear takes [tokens, in] and gives a fresh [tokens, out], with the outputs of several
modules that read the same input side by side. Of plain weights the modules keep views, so nothing is held twice.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from services.inference.worker import packed
from services.inference.worker.reordered import Reordered, join


class Linear(Protocol):
    """One matrix, or several with the same input."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, all outputs]."""
        ...

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`there` and what the call gives."""
        ...


class Dense:
    """Plain weights; those of several modules become one matrix, of which each module keeps its part."""

    def __init__(self, modules: list[Any]) -> None:
        if len(modules) == 1:
            self._weight, self._bias = modules[0].weight, modules[0].bias
            return
        whole = torch.cat([m.weight.data for m in modules])
        begin = 0
        for module in modules:
            rows = module.weight.shape[0]
            module.weight.data = whole[begin : begin + rows]
            begin += rows
        self._weight = whole
        biases = [m.bias for m in modules]
        self._bias = None if biases[0] is None else torch.cat([b.data for b in biases])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        return there + self(x)


class Modules:
    """Modules that know themselves how they compute, as those of bitsandbytes do."""

    def __init__(self, modules: list[Any]) -> None:
        self._modules = modules

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made = [module(x) for module in self._modules]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        return there + self(x)


class Bits:
    """Weights of 8 or 4 bits; those of several modules become one matrix, of which each module keeps its part."""

    def __init__(self, modules: list[Any]) -> None:
        self._all = modules[0] if len(modules) == 1 else type(modules[0]).joined(modules)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._all.forward(x)

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        return there + self(x)


def of(modules: list[Any]) -> Linear:
    """How modules with the same input are computed."""
    plain = all(type(m) is torch.nn.Linear for m in modules)
    alike = len({m.bias is None for m in modules}) == 1
    if plain and alike:
        return Dense(modules)
    if alike and {type(m) for m in modules} in ({packed.Int8}, {packed.Int4}):
        return Bits(modules)
    if alike and all(isinstance(m, Reordered) for m in modules):
        return join(modules)
    return Modules(modules)
