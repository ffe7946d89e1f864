"""What turns gradients into new weights: one process, or several (zero.py).

Law of this room: the loss of a step is the sum over its tokens divided by their
number, however it was cut into micro-batches and ranks. What an engine gives and
takes as state is whole for each parameter, so that any number of ranks can go on
from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qlorad.v1 import trainer_pb2
from services.common.worker.libraries import spare_the_compiler

_BITSANDBYTES = {
    trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT: "AdamW8bit",
    trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW: "PagedAdamW32bit",
    trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW_8BIT: "PagedAdamW8bit",
}


def optimizer_of(parameters, spec) -> torch.optim.Optimizer:
    """The optimiser of the spec; those of bitsandbytes hold small tensors' state in fp32."""
    o = spec.optimizer
    if o.kind in _BITSANDBYTES:
        spare_the_compiler()
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, _BITSANDBYTES[o.kind])
        return kind(parameters, lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay)
    if o.kind == trainer_pb2.OPTIMIZER_KIND_SGD:
        return torch.optim.SGD(
            parameters, lr=o.learning_rate, momentum=o.momentum, weight_decay=o.weight_decay, foreach=False
        )
    return torch.optim.AdamW(
        parameters, lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, foreach=False
    )


def of(model, spec, loss_of):
    """The engine of the spec. `loss_of` gives a batch's summed loss; from here on ask the engine for it (`loss`)."""
    if spec.parallelism.ranks > 1:
        from services.trainer.worker.zero import Ranked

        return Ranked(model, spec, loss_of)
    return Solo(model, spec, loss_of)


class Solo:
    """One process."""

    rank, world = 0, 1

    def __init__(self, model, spec, loss_of=None) -> None:
        self.model = model
        self.loss = loss_of
        self.parameters = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
        self.trained = sum(p.numel() for p in self.parameters.values())
        self.optimizer = optimizer_of(list(self.parameters.values()), spec)
        self._cut = spec.optimizer.max_grad_norm or float("inf")

    def mine(self, micro_batches):
        """The micro-batches of this rank, with their weights; backward() must follow for each."""
        return [(rows, 1.0) for rows in micro_batches]

    def backward(self, loss_sum, trained_tokens: int) -> None:
        """Adds a micro-batch's part of the step's gradient."""
        (loss_sum / trained_tokens).backward()

    def total(self, *numbers: float) -> list[float]:
        """Sums over ranks."""
        return list(numbers)

    def barrier(self) -> None:
        """Waits for the other ranks."""

    def step(self, rate: float, scale: float = 1.0) -> float:
        """Moves the weights, but not where the gradient is no number; returns its norm before it was cut.

        `scale` is what the loss was multiplied by.
        """
        if scale != 1.0:
            for p in self.parameters.values():
                p.grad.div_(scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._cut, foreach=False)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def forget(self) -> None:
        """Drops gradients of a step that is not finished."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def parameter_norm(self) -> float:
        """Of all trained weights together."""
        return sum([float(p.float().pow(2).sum()) for p in self.parameters.values()]) ** 0.5

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, fp32, on every rank."""
        return {n: p.detach().float() for n, p in self.parameters.items()}

    def state(self) -> Iterator[tuple[str, dict]]:
        """The optimiser's state of each parameter, whole, in the order of names, on every rank."""
        for name, p in self.parameters.items():
            yield name, {k: v for k, v in self.optimizer.state.get(p, {}).items() if v is not None}

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor], state: dict[str, dict]) -> None:
        """Puts weights and state back, whoever gave them."""
        for name, p in self.parameters.items():
            p.copy_(weights[name])
            own = state.get(name, {})
            if own:
                self.optimizer.state[p] = {
                    k: v.to(p.device) if isinstance(v, torch.Tensor) and k != "step" else v for k, v in own.items()
                }
