"""Linear modules with LoRA branches, several that read one tensor at a time: forward and backward written out.

Law of this room: gives what peft's forward gives, but for rounding, and keeps only
what the backward pass cannot do without: the tensor that was read, in its own type,
what A made of it, and with DoRA what W + BA made of it. A quantised weight is made plain once forward and once
backward and never kept. Nothing but LoRA weights gets a gradient, in their own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.common.worker import dora

_ROWS = 128
"""Tokens that are summed together; they stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A frozen linear module, and the LoRA weights on it if it has any."""

    base: Any
    a: Any = None
    """The module that holds A; its weight is looked up with every call."""
    b: Any = None
    m: Any = None
    """The module that holds DoRA's magnitudes, if they are learnt."""
    scale: float = 0.0
    dropout: float = 0.0

    def weight(self) -> torch.Tensor:
        """The frozen weight as plain numbers, made anew where it is quantised."""
        return dora.plain_weight(self.base)

    @property
    def trained(self) -> tuple[Any, ...]:
        """A, B and the magnitudes, as far as there are any."""
        return tuple(held.weight for held in (self.a, self.b, self.m) if held is not None)

    @property
    def keeps(self) -> int:
        """Tensors that `ahead` gives for it to the backward pass."""
        return 0 if self.a is None else 1 if self.m is None else 3


def of(module: Any) -> Linear | None:
    """A linear module as this room knows it; None where peft has to do it itself."""
    base = getattr(module, "base_layer", module)
    if not _is_plain(base):
        return None
    if base is module:
        return Linear(base)
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else (None,)
    if name not in module.lora_A or module.lora_bias[name] or module.merged:
        return None  # more than one adapter, or none
    m = module.lora_magnitude_vector[name] if name in module.lora_magnitude_vector else None
    if bool(module.lora_variant) != (m is not None) or type(m).__name__ not in ("NoneType", "DoraLinearLayer"):
        return None  # a kind of branch that is not known here
    dropout = float(getattr(module.lora_dropout[name], "p", 0.0))
    return Linear(base, module.lora_A[name], module.lora_B[name], m, float(module.scaling[name]), dropout)


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
    """Outputs of a group, and what to keep of each branch; `x` has two dimensions."""
    made, through = [], []
    for linear, keep in zip(group, keeps, strict=True):
        plain, bias = linear.weight().t(), linear.base.bias
        late = bias if linear.m is not None else None  # magnitudes do not touch the bias
        y = torch.mm(x, plain) if bias is None or late is not None else torch.addmm(bias.to(x.dtype), x, plain)
        if linear.a is not None:
            a, b = (w.detach().to(x.dtype) for w in linear.trained[:2])
            read = _dropped(x, keep, linear)
            seen = torch.mm(read, a.t())
            through.append(seen)
            if linear.m is None:
                y.addmm_(seen, b.t(), alpha=linear.scale)
            else:
                z = y if keep is None else torch.mm(read, plain)
                rest = None if keep is None else y.sub_(z)
                size = dora.sizes(plain.t(), linear.a.weight, linear.b.weight, linear.scale)
                through += [z.addmm_(seen, b.t(), alpha=linear.scale), size]
                y = _times(z, linear.m.weight.detach() / size)
                y = y if rest is None else y.add_(rest)
        made.append(y if late is None else y.add_(late.to(x.dtype)))
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
        whole, gain, kept = slope, None, [next(seen) for _ in range(linear.keeps)]
        if linear.m is not None:
            gain = linear.m.weight.detach() / kept[2]
            slope = _times(whole, gain)
        if wanted:
            plain = linear.weight()
            straight = slope if keep is None else whole
            slope_x = torch.mm(straight, plain) if slope_x is None else slope_x.addmm_(straight, plain)
            if gain is not None and keep is not None:
                slope_x.add_(_dropped(torch.mm(_times(whole, gain - 1), plain), keep, linear))
            del plain
        if linear.a is None:
            continue
        a, b = (w.detach().to(x.dtype) for w in linear.trained[:2])
        inner = torch.mm(slope, b).mul_(linear.scale)
        grown.append(torch.mm(inner.t(), _dropped(x, keep, linear)).to(linear.a.weight.dtype))
        outer = torch.mm(kept[0].t(), slope).mul_(linear.scale)
        grown.append(outer.t().to(linear.b.weight.dtype, memory_format=torch.contiguous_format))
        if linear.m is not None:
            grown.append(_along(whole, kept[1]).div_(kept[2]).to(linear.m.weight.dtype))
        if wanted and slope_x is not None:
            if keep is None:
                slope_x.addmm_(inner, a)
            else:
                slope_x.add_(_dropped(torch.mm(inner, a), keep, linear))
    return slope_x, grown


def _times(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Every column times its number, in the type of x, rounded once."""
    return torch.mul(x, gain, out=torch.empty_like(x))


def _along(slope: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Sums of their products over rows, in fp32, some rows at a time."""
    found = torch.zeros(z.shape[1], dtype=torch.float32, device=z.device)
    for at in range(0, len(z), _ROWS):
        found += (slope[at : at + _ROWS].float() * z[at : at + _ROWS].float()).sum(0)
    return found


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
