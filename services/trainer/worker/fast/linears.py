"""Linear modules with LoRA branches, several that read one tensor at a time: forward and backward written out.

Law of this room: gives what peft's forward gives, but for rounding, and keeps only
what the backward pass cannot do without: the tensor that was read, in its own type,
and what A made of it. A quantised weight is made plain once forward and once
backward and never kept. Nothing but LoRA weights gets a gradient, in their own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Linear:
    """A frozen linear module, and the LoRA weights on it if it has any."""

    base: Any
    a: Any = None
    """The module that holds A; its weight is looked up with every call."""
    b: Any = None
    scale: float = 0.0
    dropout: float = 0.0

    def weight(self) -> torch.Tensor:
        """The frozen weight as plain numbers, made anew where it is quantised."""
        held = self.base.weight
        state = getattr(held, "quant_state", None)
        if state is None:
            return held
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(held.data, state)

    @property
    def trained(self) -> tuple[Any, ...]:
        """A and B, or nothing."""
        return () if self.a is None else (self.a.weight, self.b.weight)


def of(module: Any) -> Linear | None:
    """A linear module as this room knows it; None where peft has to do it itself."""
    base = getattr(module, "base_layer", module)
    if not _is_plain(base):
        return None
    if base is module:
        return Linear(base)
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else (None,)
    if name not in module.lora_A or module.lora_variant or module.lora_bias[name] or module.merged:
        return None  # DoRA and its like, or more than one adapter
    dropout = float(getattr(module.lora_dropout[name], "p", 0.0))
    return Linear(base, module.lora_A[name], module.lora_B[name], float(module.scaling[name]), dropout)


def _is_plain(base: Any) -> bool:
    held: Any = getattr(base, "weight", None)
    if type(base) is torch.nn.Linear:
        return held.is_floating_point() and not held.requires_grad
    return type(base).__name__ == "Linear4bit" and getattr(held, "quant_state", None) is not None


def apply(group: Sequence[Linear], x: torch.Tensor, training: bool) -> tuple[torch.Tensor, ...]:
    """What each module of the group makes of x."""
    trained = [w for linear in group for w in linear.trained]
    return _Linears.apply(x, tuple(group), training, *trained)


def ahead(
    group: Sequence[Linear], x: torch.Tensor, keeps: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of a group, and what each A made of x; `x` has two dimensions."""
    made, through = [], []
    for linear, keep in zip(group, keeps, strict=True):
        plain, bias = linear.weight().t(), linear.base.bias
        y = torch.mm(x, plain) if bias is None else torch.addmm(bias.to(x.dtype), x, plain)
        if linear.a is not None:
            a, b = (w.detach().to(x.dtype) for w in linear.trained)
            seen = torch.mm(_dropped(x, keep, linear), a.t())
            y.addmm_(seen, b.t(), alpha=linear.scale)
            through.append(seen)
        made.append(y)
    return made, through


def back(
    group: Sequence[Linear],
    x: torch.Tensor,
    through: Sequence[torch.Tensor],
    keeps: Sequence[torch.Tensor | None],
    slopes: Sequence[torch.Tensor],
    wanted: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The slope of x where it is wanted, and those of the LoRA weights, in order."""
    grown: list[torch.Tensor] = []
    slope_x: torch.Tensor | None = None
    seen = iter(through)
    for linear, keep, slope in zip(group, keeps, slopes, strict=True):
        if wanted:
            plain = linear.weight()
            slope_x = torch.mm(slope, plain) if slope_x is None else slope_x.addmm_(slope, plain)
            del plain
        if linear.a is None:
            continue
        a, b = (w.detach().to(x.dtype) for w in linear.trained)
        inner = torch.mm(slope, b).mul_(linear.scale)
        grown.append(torch.mm(inner.t(), _dropped(x, keep, linear)).to(linear.a.weight.dtype))
        outer = torch.mm(next(seen).t(), slope).mul_(linear.scale)
        grown.append(outer.t().to(linear.b.weight.dtype, memory_format=torch.contiguous_format))
        if wanted and slope_x is not None:
            if keep is None:
                slope_x.addmm_(inner, a)
            else:
                slope_x.add_(_dropped(torch.mm(inner, a), keep, linear))
    return slope_x, grown


def drawn(group: Sequence[Linear], x: torch.Tensor, training: bool) -> list[torch.Tensor | None]:
    """For every branch with dropout, which numbers it sees."""
    return [torch.rand(x.shape, device=x.device) >= g.dropout if training and g.dropout else None for g in group]


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, linear: Linear) -> torch.Tensor:
    return x if keep is None else (x * keep).mul_(1.0 / (1.0 - linear.dropout))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: tuple[Linear, ...], training: bool, *trained: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        keeps = drawn(group, flat, training)
        made, through = ahead(group, flat, keeps)
        ctx.group, ctx.shape, ctx.count = group, x.shape, len(through)
        ctx.save_for_backward(flat if trained else None, *through, *keeps)
        return tuple(y.view(*x.shape[:-1], -1) for y in made)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        flat, *rest = ctx.saved_tensors
        if flat is None:
            flat = slopes[0].new_empty(0)
        slope_x, grown = back(
            ctx.group,
            flat,
            rest[: ctx.count],
            rest[ctx.count :],
            [slope.reshape(-1, slope.shape[-1]) for slope in slopes],
            ctx.needs_input_grad[0],
        )
        return (slope_x.view(ctx.shape) if slope_x is not None else None, None, None, *grown)
