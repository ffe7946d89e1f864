"""The parts of a Llama-like layer between its linear modules: norm, and the gated feed-forward part.

Law of this room: as in linears.py: what the model's own modules give but for rounding,
and kept is only what cannot be made again cheaply.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from services.trainer.worker.fast import linears

_ROWS = 128
"""Tokens that a norm looks at together: they stay in the processor's cache."""


class Norm(torch.autograd.Function):
    """RMS norm with a frozen weight; keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        made = torch.empty_like(flat)
        size = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
        for at in range(0, len(flat), _ROWS):
            part = flat[at : at + _ROWS].float()
            one = torch.rsqrt(part.square().mean(-1, keepdim=True).add_(eps))
            size[at : at + _ROWS] = one
            made[at : at + _ROWS] = part * one
        ctx.save_for_backward(flat, size, weight)
        return made.mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        flat, size, weight = ctx.saved_tensors
        grown = slope.reshape(flat.shape)
        made = torch.empty_like(flat)
        heavy = weight.float()
        for at in range(0, len(flat), _ROWS):
            one = size[at : at + _ROWS]
            normal = flat[at : at + _ROWS].float() * one
            part = grown[at : at + _ROWS].float() * heavy
            along = (part * normal).mean(-1, keepdim=True)
            made[at : at + _ROWS] = part.sub_(normal.mul_(along)).mul_(one)
        return made.view(slope.shape), None, None


class Gated(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)): keeps x, gate and up; their product is made again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, training: bool, *trained: torch.Tensor) -> Any:
        pair, down = group[:2], group[2:]
        flat = x.reshape(-1, x.shape[-1])
        keeps = linears.drawn(pair, flat, training)
        (gate, up), through = linears.ahead(pair, flat, keeps)
        inner = F.silu(gate).mul_(up)
        keeps += linears.drawn(down, inner, training)
        (made,), last = linears.ahead(down, inner, keeps[2:])
        ctx.group, ctx.shape, ctx.counts = group, x.shape, (len(through), len(last))
        ctx.save_for_backward(flat if through else None, gate, up, *keeps, *through, *last)
        return made.view(x.shape)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        flat, gate, up, *rest = ctx.saved_tensors
        keeps, through, last = rest[:3], rest[3 : 3 + ctx.counts[0]], rest[3 + ctx.counts[0] :]
        pair, down = ctx.group[:2], ctx.group[2:]
        flat = gate if flat is None else flat
        opened = F.silu(gate)
        grown = slope.reshape(-1, slope.shape[-1])
        slope_inner, of_down = linears.back(down, opened * up, last, keeps[2:], [grown], True)
        assert slope_inner is not None
        slope_up = opened.mul_(slope_inner)
        slope_gate = torch.ops.aten.silu_backward(slope_inner.mul_(up), gate)
        slope_x, of_pair = linears.back(pair, flat, through, keeps[:2], [slope_gate, slope_up], ctx.needs_input_grad[0])
        return (slope_x.view(ctx.shape) if slope_x is not None else None, None, None, *of_pair, *of_down)
