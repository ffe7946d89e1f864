"""DoRA: how large each output's weights are, apart from where they point.

Law of this room: with s = ||W + scaling B A||, row by row, and learnt magnitudes m, a
module gives bias + (m / s) (W x + scaling B A x). Training and serving take s from
here, in fp32, so that what was learnt is what is served.
"""

from __future__ import annotations

from typing import Any

import torch

_NUMBERS = 1 << 18
"""Of a weight that are looked at together: they stay in the processor's cache."""


def plain_weight(module: Any) -> torch.Tensor:
    """The frozen weight of a linear module as plain numbers, made anew where it is held in few bits."""
    small = getattr(module, "dequantized", None)
    if small is not None:
        return small
    held = module.weight
    state = getattr(held, "quant_state", None)
    if state is None:
        return held
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(held.data, state)


@torch.no_grad()
def sizes(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """||weight + scaling b a|| of every row, fp32; never holds a second weight."""
    a, b = a.float(), b.float()
    found = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, _NUMBERS // weight.shape[1])
    for at in range(0, len(weight), rows):
        part = torch.addmm(weight[at : at + rows].float(), b[at : at + rows], a, alpha=scaling)
        found[at : at + rows] = torch.linalg.vector_norm(part, dim=1)
    return found
