"""Objectives of next tokens.

Law of this room: torch is imported when a loss is asked for, so that a describe
worker needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.worker.objectives.api import parameter


@dataclass(frozen=True, slots=True)
class Completion:
    """Cross-entropy of the tokens that the data marks as learnt: answers, or all of a plain text."""

    def token_losses(self, logits, labels):  # type: ignore[no-untyped-def]
        """Minus the log-probability of each."""
        import torch.nn.functional as F

        return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True, slots=True)
class LabelSmoothing:
    """Cross-entropy against a target that leaves a little to every other token."""

    smoothing: float = parameter(0.1, help="the share of the target that all tokens have alike", minimum=0, maximum=1)

    def token_losses(self, logits, labels):  # type: ignore[no-untyped-def]
        """Minus the expected log-probability under the smoothed target."""
        import torch.nn.functional as F

        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
