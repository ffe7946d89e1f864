"""Every row looks at its own keys and values, and at no other's.

Law of this room: `store` puts the new keys and values of a layer into the rows' places, `look`
attends. Rows with one new token are attended together, lane by lane. A window bounds how far
back a token sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.inference.worker.flat import Alone, Flat, Together

_HIDDEN = float("-inf")
_NEAR = 512
"""Positions up to which a processor is quicker with the heads that share keys taken together."""


def store(flat: Flat, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Puts new keys and values [tokens, heads, width] into their places."""
    for group in flat.together:
        some = slice(group.begin, group.end)
        for held, new in ((group.lane.keys[layer], keys), (group.lane.values[layer], values)):
            if group.at >= 0 and isinstance(group.slots, slice):
                held[group.slots, :, group.at] = new[some]
            else:
                held[group.numbers, :, group.starts] = new[some]
    for one in flat.alone:
        to = one.start + one.end - one.begin
        for held, new in ((one.place.lane.keys[layer], keys), (one.place.lane.values[layer], values)):
            held[one.place.slot, :, one.start : to] = new[one.begin : one.end].transpose(0, 1)


def look(flat: Flat, layer: int, queries: torch.Tensor, scale: float, window: int = 0) -> torch.Tensor:
    """What each token [tokens, heads, width] finds; `window` 0 = everything before it."""
    if len(flat.together) == 1 and not flat.alone:
        return _rows(flat, 0, flat.together[0], layer, queries, scale, window)
    found = torch.zeros_like(queries)
    for number, group in enumerate(flat.together):
        found[group.begin : group.end] = _rows(flat, number, group, layer, queries, scale, window)
    for number, one in enumerate(flat.alone):
        found[one.begin : one.end] = _piece(flat, -1 - number, one, layer, queries, scale, window)
    return found


def _rows(
    flat: Flat, number: int, group: Together, layer: int, queries: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    rows, (heads, width) = group.end - group.begin, queries.shape[1:]
    keys = group.lane.keys[layer][group.slots, :, : group.span]
    values = group.lane.values[layer][group.slots, :, : group.span]
    shared = keys.shape[1]
    mask = flat.mask(number, window, lambda: _rows_mask(group, window, queries))
    if group.span <= _NEAR:  # heads that share keys as so many queries: the keys are read once
        asked = queries[group.begin : group.end].view(rows, shared, heads // shared, width)
        made = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scale)
    else:
        asked = queries[group.begin : group.end].view(rows, heads, 1, width)
        made = F.scaled_dot_product_attention(
            asked, keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != shared
        )
    return made.reshape(rows, heads, width)


def _rows_mask(group: Together, window: int, like: torch.Tensor) -> torch.Tensor | None:
    """[rows, 1, 1, span] to be added; None where every row sees everything."""
    if min(group.ends) == group.span and not 0 < window < group.span:
        return None
    seen = torch.arange(group.span, device=like.device)[None, :]
    hidden = seen > group.starts[:, None]
    if window:
        hidden |= seen <= group.starts[:, None] - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, _HIDDEN)[:, None, None]


def _piece(
    flat: Flat, number: int, one: Alone, layer: int, queries: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    tokens, end = one.end - one.begin, one.start + one.end - one.begin
    keys = one.place.lane.keys[layer][one.place.slot, :, :end]
    values = one.place.lane.values[layer][one.place.slot, :, :end]
    asked = queries[one.begin : one.end].transpose(0, 1)[None]
    is_whole = one.start == 0 and not 0 < window < end
    mask = None if is_whole else flat.mask(number, window, lambda: _piece_mask(one, tokens, end, window, queries))
    made = F.scaled_dot_product_attention(
        asked, keys[None], values[None], attn_mask=mask, is_causal=is_whole, scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[0],
    )  # fmt: skip
    return made[0].transpose(0, 1)


def _piece_mask(one: Alone, tokens: int, end: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """[1, 1, tokens, positions] to be added."""
    seen = torch.arange(end, device=like.device)[None, :]
    own = torch.arange(one.start, end, device=like.device)[:, None]
    hidden = seen > own
    if window:
        hidden |= seen <= own - window
    return torch.zeros((tokens, end), dtype=like.dtype, device=like.device).masked_fill_(hidden, _HIDDEN)[None, None]
