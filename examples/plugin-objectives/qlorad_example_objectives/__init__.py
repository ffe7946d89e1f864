"""One objective: the focal loss, which looks away from tokens that are known already.

An objective is a frozen dataclass. Its fields are the parameters; its
docstring's first line is what `qlorad job objectives` tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from services.trainer.worker.objectives import api


@dataclass(frozen=True, slots=True)
class Focal:
    """Cross-entropy times (1 - p) to a power: what is known already counts less."""

    gamma: float = api.parameter(2.0, help="the power; 0 is plain cross-entropy", minimum=0, maximum=10)

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One number a token."""
        plain = F.cross_entropy(logits, labels, reduction="none")
        return (1 - torch.exp(-plain)) ** self.gamma * plain
