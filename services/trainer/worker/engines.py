"""What turns gradients into new weights: one process, or several by DeepSpeed ZeRO-2.

Law of this room: the loss of a step is the sum over its tokens divided by their
number, however it was cut into micro-batches and ranks.
"""

from __future__ import annotations

import torch

from qlorad.v1 import trainer_pb2
from services.common.worker.libraries import spare_the_compiler
from services.trainer import launch

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


class Solo:
    """One process."""

    rank, world = 0, 1

    def __init__(self, model, spec) -> None:
        self.model = model
        self.parameters = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
        self.optimizer = optimizer_of(list(self.parameters.values()), spec)
        self._cut = spec.optimizer.max_grad_norm or float("inf")

    def mine(self, micro_batches):
        """The micro-batches of this rank, with their weights."""
        return [(rows, 1.0) for rows in micro_batches]

    def backward(self, loss_sum, trained_tokens: int) -> None:
        """Adds a micro-batch's part of the step's gradient."""
        (loss_sum / trained_tokens).backward()

    def total(self, *numbers: float) -> list[float]:
        """Sums over ranks."""
        return list(numbers)

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

    def weights(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, fp32, on every rank."""
        return {n: p.detach().float() for n, p in self.parameters.items()}


class Ranked:
    """One of several processes; gradients and optimiser state are divided by ZeRO-2.

    DeepSpeed holds the adapter in bf16 with an fp32 master; weights() gives the master.
    """

    def __init__(self, model, spec) -> None:
        import deepspeed
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._accumulation = spec.data.accumulation
        trained = [p for p in model.parameters() if p.requires_grad]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer_of(trained, spec),
            model_parameters=trained,
            config=launch.deepspeed_of(spec),
        )
        assert type(self.optimizer).__name__ == "DeepSpeedZeroOptimizer", type(self.optimizer)
        self.model = self.engine.module
        self.parameters = {n: p for n, p in sorted(self.model.named_parameters()) if p.requires_grad}

    def mine(self, micro_batches):
        """This rank's share; what is missing to a full round is repeated with weight 0."""
        wanted = self._accumulation * self.world
        whole = [(rows, 1.0) for rows in micro_batches]
        whole += [(micro_batches[0], 0.0)] * (wanted - len(whole))
        return whole[self.rank :: self.world]

    def backward(self, loss_sum, trained_tokens: int) -> None:
        # DeepSpeed divides by accumulation and by ranks; the loss is a sum over the whole step.
        self.engine.backward(loss_sum * (self._accumulation * self.world / trained_tokens))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def total(self, *numbers: float) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._dist.all_reduce(tensor)
        return tensor.tolist()

    def step(self, rate: float, scale: float = 1.0) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def forget(self) -> None:
        self.engine.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).detach().cpu() for n, p in self.parameters.items()}
