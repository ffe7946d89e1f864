"""Causal attention that looks at each sample by itself, however many lie in one sequence.

Law of this room: no sample sees another, and no work is done between samples. Nothing of
length times length is kept: the backward pass makes it again, some queries at a time.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

NAME = "qlorad-spans"
_WHOLE, _QUERIES, _SCORES = 512, 128, 2 << 20
"""In the backward pass a sample of at most so many tokens is taken whole; of a longer one so many queries at a time,
and as many heads as make so many scores: they stay in the processor's cache."""
_STEP = 64
"""Samples are filled up to a multiple of this: the libraries prepare themselves anew for every length they meet."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Spans = list[tuple[int, int]]


def spans_of(positions: torch.Tensor, rows: int, length: int) -> Spans:
    """Begin and end of every sample, rows laid end to end; a sample begins where positions begin anew."""
    fresh = (positions == 0).expand(rows, length).clone()
    fresh[:, 0] = True
    begins = fresh.reshape(-1).nonzero().flatten().tolist()
    return list(itertools.pairwise([*begins, rows * length]))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """[tokens, heads, width] each, all rows end to end; keys and values may have fewer heads."""
    return _Attend.apply(q, k, v, spans, scale)


def registered(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **told: Any
) -> tuple[torch.Tensor, None]:
    """The same as transformers calls it: [rows, heads, length, width]."""
    rows, heads, length, width = query.shape
    if attention_mask is not None or told.get("softcap") is not None or key.shape[2] != length:
        raise ValueError("this attention is for training on whole rows, without a mask or a cap on scores")
    if told.get("position_ids") is None or told.get("dropout") or not getattr(module, "is_causal", False):
        raise ValueError("this attention needs positions, looks back only, and drops nothing")
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, width) for t in (query, key, value))
    scale = told.get("scaling") or width**-0.5
    made = attend(q, k, v, spans_of(told["position_ids"], rows, length), scale)
    return made.view(rows, length, heads, width), None


def ahead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """What attention gives."""
    made, share = torch.empty_like(q), q.shape[1] // k.shape[1]
    for begin, end in spans:
        one = (_sample(t, begin, end, n)[None] for t, n in ((q, 1), (k, share), (v, share)))
        out, _ = _flash(*one, 0.0, True, scale=scale)
        made[begin:end] = out[0, :, : end - begin].transpose(0, 1)
    return made


def back(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slopes of q, k and v."""
    found, share = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)), q.shape[1] // k.shape[1]
    for begin, end in spans:
        one = [_sample(t, begin, end, n) for t, n in ((q, 1), (k, share), (v, share), (slope, 1))]
        for whole, piece in zip(found, _back(one[0], one[1], one[2], one[3], scale), strict=True):
            if piece.shape[0] != whole.shape[1]:  # several query heads read one head of keys
                piece = piece.view(whole.shape[1], -1, *piece.shape[1:]).sum(1)
            whole[begin:end] = piece[:, : end - begin].transpose(0, 1)
    return found


def _sample(whole: torch.Tensor, begin: int, end: int, times: int) -> torch.Tensor:
    """One sample as [heads, tokens, width], filled up behind, where no token looks; each head so many times."""
    part = whole[begin:end].transpose(0, 1)
    more = -(end - begin) % _STEP
    if more:
        part = F.pad(part, (0, 0, 0, more))
    return part if times == 1 else part.repeat_interleave(times, 0)


def _back(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one sample, [heads, tokens, width]; some queries at a time, each against the keys it may see."""
    heads, length = q.shape[:2]
    if length <= _WHOLE:
        return _block(q, k, v, slope, scale, 0)
    slope_q = torch.empty_like(q)
    slope_k, slope_v = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    for at in range(0, length, _QUERIES):
        to = min(length, at + _QUERIES)
        seen = min(length, to + -to % _WHOLE)  # few different lengths; what is too much is hidden
        together = max(1, _SCORES // (_QUERIES * seen))
        for head in range(0, heads, together):
            some = slice(head, head + together)
            one, keys, values = _block(q[some, at:to], k[some, :seen], v[some, :seen], slope[some, at:to], scale, at)
            slope_q[some, at:to] = one
            slope_k[some, :seen] += keys
            slope_v[some, :seen] += values
    return slope_q, slope_k.to(k.dtype), slope_v.to(v.dtype)


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, scale: float, before: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that stand behind `before` others; as little as can be is done with all scores."""
    after = k.shape[1] - before
    hidden = torch.full((q.shape[1], after), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    q = q * scale
    share = torch.bmm(q, k.transpose(1, 2))
    share[:, :, before:] += hidden
    share = torch.softmax(share, -1)
    slope_v = torch.bmm(share.transpose(1, 2), slope)
    inner = torch._softmax_backward_data(torch.bmm(slope, v.transpose(1, 2)), share, -1, q.dtype)
    return torch.bmm(inner, k).mul_(scale), torch.bmm(inner.transpose(1, 2), q), slope_v


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float) -> Any:
        ctx.spans, ctx.scale = spans, scale
        ctx.save_for_backward(q, k, v)
        return ahead(q, k, v, spans, scale)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        return (*back(q, k, v, slope, ctx.spans, ctx.scale), None, None)


class Rotated(torch.autograd.Function):
    """Attention of Llama's kind: queries and keys turned by their positions, then `attend`.

    cos and sin are [tokens, width]; q, k, v [tokens, heads, width].
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, spans: Spans, scale: float) -> Any:
        half, turn = cos.shape[-1] // 2, _turn(sin)
        q, k = (torch.addcmul(t * cos[:, None], t.roll(half, -1), turn) for t in (q, k))
        ctx.spans, ctx.scale = spans, scale
        ctx.save_for_backward(q, k, v, cos, sin)
        return ahead(q, k, v, spans, scale)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        q, k, v, cos, sin = ctx.saved_tensors
        slope_q, slope_k, slope_v = back(q, k, v, slope, ctx.spans, ctx.scale)
        half, turn = cos.shape[-1] // 2, _turn(sin)
        turned = ((s * cos[:, None]).add_((s * turn).roll(half, -1)) for s in (slope_q, slope_k))
        return (*turned, slope_v, None, None, None, None)


def _turn(sin: torch.Tensor) -> torch.Tensor:
    """What the other half of a head is multiplied by."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None]
