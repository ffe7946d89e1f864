"""One of several processes; DeepSpeed ZeRO divides what is held.

Law of this room: the numbers are those of one process. Trained weights, gradients
and state are fp32 at every stage (there is no "bf16" section, so the frozen base
keeps the type that it was loaded in), and every rank does the same calls in the
same order: whatever is asked here is asked on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from services.trainer import launch
from services.trainer.worker.engines import optimizer_of

_SEED_STRIDE = 0x9E3779B1


class _Whole(torch.nn.Module):
    """The model together with its loss: DeepSpeed must see the beginning and the end of each forward pass."""

    def __init__(self, model, loss_of) -> None:
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, batch):
        return self._loss_of(batch)


@dataclass(frozen=True, slots=True)
class _Part:
    """What this rank holds of a parameter: `count` numbers of the group's flat tensor."""

    flat: torch.Tensor
    at: int
    """Where they lie in `flat`."""
    begin: int
    """Where they lie in the parameter."""
    count: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """They, in a tensor laid out as `flat`."""
        return flat.detach().view(-1)[self.at : self.at + self.count]

    def cut(self, value: torch.Tensor) -> torch.Tensor:
        """They, of the parameter's whole value."""
        return value.reshape(-1)[self.begin : self.begin + self.count]


class Ranked:
    """As engines.Solo, over several processes."""

    def __init__(self, model, spec, loss_of) -> None:
        import deepspeed
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = model
        self.parameters = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
        self._shapes = {n: p.shape for n, p in self.parameters.items()}
        self.trained = sum(p.numel() for p in self.parameters.values())
        trained = list(self.parameters.values())
        self._device = trained[0].device
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_Whole(model, loss_of),
            optimizer=optimizer_of(trained, spec),
            model_parameters=trained,
            config=launch.deepspeed_of(spec, self._device.type),
        )
        self.engine.aim = loss_of.aim
        self.loss = self.engine
        self._thirds = spec.parallelism.zero_stage == 3
        wanted = "DeepSpeedZeroOptimizer_Stage3" if self._thirds else "DeepSpeedZeroOptimizer"
        assert type(self.optimizer).__name__ == wanted, type(self.optimizer)
        self.optimizer.check_grad_overflow = True  # a step whose gradient is no number changes nothing
        self._rounds = 0
        # Dropout must not be the same on all ranks.
        torch.manual_seed((spec.seed + _SEED_STRIDE * (self.rank + 1)) % (1 << 63))

    def mine(self, micro_batches):
        """This rank's share; what is missing to a full round is repeated with weight 0."""
        self._rounds = -(-len(micro_batches) // self.world)
        whole = [(rows, 1.0) for rows in micro_batches]
        whole += [(micro_batches[0], 0.0)] * (self._rounds * self.world - len(whole))
        return whole[self.rank :: self.world]

    def backward(self, loss_sum, trained_tokens: int) -> None:
        # DeepSpeed divides by the number of ranks; the loss is a sum over the whole step.
        self._rounds -= 1
        self.engine.set_gradient_accumulation_boundary(self._rounds == 0)
        self.engine.backward(loss_sum * (self.world / trained_tokens), scale_wrt_gas=False)

    def total(self, *numbers: float) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        self._dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        self.total(0.0)

    def step(self, rate: float, scale: float = 1.0) -> float:
        assert scale == 1.0, "fp16 is computed by one process"
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.optimizer.overflow:
            return float("nan")
        return float(self.engine.get_global_grad_norm() or 0.0)

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.micro_step_id = 0 if self._thirds else -1
        if not self._thirds:
            self.optimizer.averaged_gradients = {}

    @torch.no_grad()
    def parameter_norm(self) -> float:
        parts = (self._part(p) for p in self.parameters.values())
        own = sum(float(part.of(part.flat).float().pow(2).sum()) for part in parts if part is not None)
        (squares,) = self.total(own)
        return float(squares**0.5)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: self._gathered(n, lambda part: part.flat) for n in self.parameters}

    def state(self) -> Iterator[tuple[str, dict]]:
        inner = self.optimizer.optimizer.state
        for name in self.parameters:
            flat = self._flat(self.parameters[name])
            own = {k: v for k, v in inner.get(flat, {}).items() if isinstance(v, torch.Tensor)}
            found = {}
            for key, value in sorted(own.items()):
                divided = value.shape == flat.shape
                found[key] = self._gathered(name, lambda part, k=key: inner[part.flat][k]) if divided else value.cpu()
            yield name, found

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor], state: dict[str, dict]) -> None:
        inner = self.optimizer.optimizer.state
        for name, p in self.parameters.items():
            whole, flat, part = weights[name], self._flat(p), self._part(p)
            if part is not None:
                part.of(flat).copy_(part.cut(whole))
                if self._thirds:
                    p.ds_tensor.view(-1)[: part.count].copy_(part.cut(whole))
            if not self._thirds:
                p.copy_(whole)
            for key, value in state.get(name, {}).items():
                if value.numel() != whole.numel():
                    inner[flat][key] = value.clone()
                    continue
                if key not in inner[flat]:
                    inner[flat][key] = torch.zeros_like(flat, requires_grad=False)
                if part is not None:
                    part.of(inner[flat][key]).copy_(part.cut(value))

    def _flat(self, p) -> torch.Tensor:
        """The flat tensor of the group that a parameter belongs to, this rank's part of it."""
        if self._thirds:
            return self.optimizer.fp32_partitioned_groups_flat[self._place(p)[0]]
        groups = self.optimizer.bit16_groups
        group = next(i for i, members in enumerate(groups) if any(m is p for m in members))
        return self.optimizer.single_partition_of_fp32_groups[group]

    def _place(self, p) -> tuple[int, int, int]:
        group, at, count = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        return group, at, count

    def _part(self, p) -> _Part | None:
        """What this rank holds of a parameter, if anything."""
        if self._thirds:
            _, at, count = self._place(p)
            begin = self.rank * count
            left = min(count, p.ds_numel - begin)
            return _Part(self._flat(p), at, begin, left) if left > 0 else None
        mapping = p._hp_mapping
        if mapping is None:
            return None
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Part(self._flat(p), inside.start, outside.start, inside.numel)

    def _gathered(self, name: str, tensor_of) -> torch.Tensor:
        """The whole of what every rank holds a part of; fp32, on the CPU."""
        part, shape = self._part(self.parameters[name]), self._shapes[name]
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self._device)
        if part is not None:
            part.cut(whole).copy_(part.of(tensor_of(part)))
        self._dist.all_reduce(whole)
        return whole.view(shape).cpu()
