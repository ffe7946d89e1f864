"""Where adapters add to a model, and who is in a forward.

Law of this room: holds what others made; computes nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from services.inference.worker import each, stacks
from services.inference.worker.flat import Flat


@dataclass(slots=True)
class Site:
    """One linear module, or several with the same input whose outputs stand side by side."""

    names: tuple[str, ...]
    outs: tuple[int, ...]
    biases: tuple[torch.Tensor | None, ...]
    apart: bool = False
    """Whether each module's outputs are a tensor of their own."""
    stack: stacks.Stack | None = None
    line: int = -1
    """Which line of adapters the stack was made for."""
    singles: dict[str, stacks.Stack] = field(default_factory=dict)
    """Of adapters that read a long prompt, a few."""
    table: each.Table | None = None
    """Where the matrices of each adapter lie; None where stacks do everything."""
    table_line: int = -1
    """Which line of adapters the table was made for."""

    def starts(self) -> list[int]:
        """Where each module's outputs begin."""
        return [sum(self.outs[:n]) for n in range(len(self.outs))]

    def forget(self, digest: str, line: int) -> None:
        """Lets go of an adapter; `line` is the one that counts from now on."""
        self.singles.pop(digest, None)
        if self.line != line:
            self.stack = None
        if self.table_line != line:
            self.table, self.table_line = None, -1


@dataclass(slots=True)
class Choice:
    """Who is in the forward that comes."""

    flat: Flat | None = None
    rows: tuple[str, ...] = ()
    """Of the tokens that share the stack, the first, one each."""
    spans: tuple[tuple[int, int, str], ...] = ()
    """Of the tokens that share the stack, the others."""
    shared: int = 0
    """Tokens that share the stack; 0 = none of them has an adapter."""
    long: tuple[tuple[int, int, str], ...] = ()
    """Prompts that have their adapter alone."""
    only: bool = False
    """Whether the stack is of one adapter, and every token that shares it has that."""
    turn: each.Turn | None = None
    """Whose each token that shares the stack is, where doing without one is quicker."""
    silences: dict[tuple[int, ...], stacks.Silence] = field(default_factory=dict)
    """By the columns of a stack."""

    def whose(self, tokens: int) -> list[str]:
        """The adapter of each of the first tokens."""
        found = [*self.rows, *([""] * (tokens - len(self.rows)))]
        for begin, end, digest in (*self.spans, *self.long):
            if begin < tokens:
                found[begin:end] = [digest] * (end - begin)
        return found
