"""The loss of a batch: minus the log-probabilities of its trained tokens, summed, without holding all logits.

Law of this room: what is computed is the loss of the model's own logits. The
short way (decoder, then the head for trained tokens alone, some at a time) is
taken only where a probe has seen that it gives those logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from services.trainer.launch import LOGITS_BYTES

Batch: TypeAlias = dict[str, torch.Tensor]
Loss: TypeAlias = Callable[[Batch], torch.Tensor]

CHUNK_BYTES = LOGITS_BYTES
ROUND_TOKENS = 64
_PROBE_TOKENS = 6
_NEAR = 1e-3
"""Of the largest logit; another head, or a cap on logits, is farther away by far."""


def of(model: Any) -> tuple[Loss, str]:
    """The loss for a model, and why it is the plain one; empty where it is not."""
    why = _hindrance(model)
    return (Plain(model), why) if why else (Chunked(model), "")


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

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, batch: Batch) -> torch.Tensor:
        batch = filled(batch)
        labels = batch["labels"][:, 1:]
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        logits = self._model(**inputs, use_cache=False).logits[:, :-1]
        keep = labels != -100
        return F.cross_entropy(logits[keep].float(), labels[keep], reduction="sum")


class Chunked:
    """By the head, for trained tokens alone, some at a time; no more logits than that are ever held."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        self._decoder, self._head = base.base_model, base.get_output_embeddings()
        self._chunk = max(1, CHUNK_BYTES // (4 * self._head.weight.shape[0]))

    def __call__(self, batch: Batch) -> torch.Tensor:
        batch = filled(batch)
        labels = batch["labels"][:, 1:]
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        hidden = self._decoder(**inputs, use_cache=False).last_hidden_state[:, :-1]
        keep = labels != -100
        total: torch.Tensor = _Sum.apply(hidden[keep], self._head.weight, self._head.bias, labels[keep], self._chunk)
        return total


class _Sum(torch.autograd.Function):
    """Cross-entropy of a frozen head, summed. The gradient is made with the loss: no logit is needed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), chunk):
            part, wanted = hidden[begin : begin + chunk], labels[begin : begin + chunk, None]
            slope = torch.log_softmax(F.linear(part, weight, bias), -1, dtype=torch.float32)
            total -= slope.gather(1, wanted).sum()
            if gradient is not None:
                slope.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
                gradient[begin : begin + chunk] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def, override]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None


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
