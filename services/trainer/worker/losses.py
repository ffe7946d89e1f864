"""The loss of a batch: that of its trained tokens, summed, without holding all logits.

Law of this room: what is computed is the loss of the model's own logits. The
short way (decoder, then the head for trained tokens alone, some at a time) is
taken only where a probe has seen that it gives those logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F

from services.trainer.launch import LOGITS_BYTES
from services.trainer.worker.aim import Aim

Batch: TypeAlias = dict[str, torch.Tensor]
TokenLosses: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CHUNK_BYTES = LOGITS_BYTES
ROUND_TOKENS = 64
_PROBE_TOKENS = 6
_NEAR = 1e-3
"""Of the largest logit; another head, or a cap on logits, is farther away by far."""


class Loss(Protocol):
    """The summed loss of a batch's trained tokens."""

    aim: Aim

    def __call__(self, batch: Batch) -> torch.Tensor: ...


def of(model: Any, aim: Aim | None = None) -> tuple[Loss, str]:
    """The loss for a model, and why it is the plain one; empty where it is not."""
    why = _hindrance(model)
    return (Plain(model, aim), why) if why else (Chunked(model, aim), "")


def filled(batch: Batch) -> Batch:
    """A packed batch filled up to a round length by a sample without labels.

    On a CPU the libraries prepare themselves anew for every length they meet: that takes time, and memory that is
    never given back.
    """
    more = -batch["input_ids"].shape[1] % ROUND_TOKENS
    if "position_ids" not in batch or not more or batch["input_ids"].device.type != "cpu":
        return batch
    rest = torch.arange(more).expand(len(batch["input_ids"]), -1)
    return {
        "input_ids": F.pad(batch["input_ids"], (0, more)),
        "labels": F.pad(batch["labels"], (0, more), value=-100),
        "position_ids": torch.cat((batch["position_ids"], rest), 1),
    }


class Plain:
    """By the model's own logits, all of them."""

    def __init__(self, model: Any, aim: Aim | None = None) -> None:
        self._model, self.aim = model, aim or Aim()

    def __call__(self, batch: Batch) -> torch.Tensor:
        batch = batch if self.aim.predicts_itself else filled(batch)
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        logits, labels = self._model(**inputs, **self.aim.extras).logits, batch["labels"]
        if not self.aim.predicts_itself:
            logits, labels = logits[:, :-1], labels[:, 1:]
        keep = labels != -100
        if self.aim.is_plain:
            return F.cross_entropy(logits[keep].float(), labels[keep], reduction="sum")
        return self.aim.token_losses(logits[keep].float(), labels[keep]).sum()


class Chunked:
    """By the head, for trained tokens alone, some at a time; no more logits than that are ever held."""

    def __init__(self, model: Any, aim: Aim | None = None) -> None:
        base = model.get_base_model()
        self._decoder, self._head = base.base_model, base.get_output_embeddings()
        self._chunk = max(1, CHUNK_BYTES // (4 * self._head.weight.shape[0]))
        self.aim = aim or Aim()
        self._token_losses = None if self.aim.is_plain else self.aim.token_losses

    def __call__(self, batch: Batch) -> torch.Tensor:
        batch = batch if self.aim.predicts_itself else filled(batch)
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        hidden, labels = self._decoder(**inputs, **self.aim.extras).last_hidden_state, batch["labels"]
        if not self.aim.predicts_itself:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        keep = labels != -100
        total: torch.Tensor = _Sum.apply(
            hidden[keep], self._head.weight, self._head.bias, labels[keep], self._chunk, self._token_losses
        )
        return total


class _Sum(torch.autograd.Function):
    """Cross-entropy of a frozen head, summed. The gradient is made with the loss: no logit is needed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, token_losses):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), chunk):
            part, wanted = hidden[begin : begin + chunk], labels[begin : begin + chunk, None]
            logits = F.linear(part, weight, bias)
            if token_losses is not None:
                value, slope = _by_objective(token_losses, logits.float(), wanted[:, 0], gradient is not None)
                total += value
                if gradient is not None:
                    gradient[begin : begin + chunk] = slope.to(weight.dtype) @ weight
                continue
            slope = torch.log_softmax(logits, -1, dtype=torch.float32)
            total -= slope.gather(1, wanted).sum()
            if gradient is not None:
                slope.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
                gradient[begin : begin + chunk] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def, override]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def _by_objective(token_losses: TokenLosses, logits: torch.Tensor, labels: torch.Tensor, wants_slope: bool) -> Any:
    """The sum of some tokens' losses, and its slope by the logits."""
    if not wants_slope:
        return token_losses(logits, labels).sum(), None
    with torch.enable_grad():
        logits.requires_grad_()
        value = token_losses(logits, labels).sum()
        (slope,) = torch.autograd.grad(value, logits)
    return value.detach(), slope


@torch.no_grad()
def _hindrance(model: Any) -> str:
    """Why the short way cannot be taken; empty where it can."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point():
        return "the head is no plain linear module"
    if any(p.requires_grad for p in head.parameters()) or base.base_model is base:
        return "the head is trained, or is no part of its own"
    was_training = model.training
    model.eval()
    ids = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % head.weight.shape[0]
    own = base(input_ids=ids, use_cache=False).logits.float()
    short = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(was_training)
    far = float((own - short).abs().max()) > _NEAR * float(own.abs().max())
    return "the model does more to its logits than its head" if far else ""
