"""What an author of objectives may import; it stays what it is within a major version.

Law of this room: names only, no state. An objective is a frozen dataclass whose
fields are declared with `parameter` and that has a method
`token_losses(logits, labels)`; its docstring's first line is what ListObjectives
tells. A package brings one by the entry point group `qlorad.objectives`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from services.common.parameters import parameter

if TYPE_CHECKING:
    import torch

__all__ = ["Objective", "parameter"]


class Objective(Protocol):
    """What an objective is, beside being a frozen dataclass."""

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each token, one number a token; qlorad sums them and divides by all tokens of the step.

        `logits` are fp32, tokens by vocabulary; `labels` are the tokens to be
        predicted. It is called several times a step, with as many tokens at a
        time as memory allows, so a token's loss depends on that token alone.
        """
        ...
