"""Adapters beside one base: every row of a batch gets the change of its own adapter.

Law of this room: the base's weights are never touched. At a layer the A and B of
all adapters in the batch stand side by side; what a row's own adapter does not
make is set to zero between A and B, so no row is coloured by another. DoRA (see
common/worker/dora) needs gain * (W x + BA x): the gain is in B, and gain - 1 times
what the base's weight made of x comes on top, only where a row of the batch has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from services.common.errors import rejected
from services.common.worker import dora
from services.common.worker.adapter import MAGNITUDE, WEIGHTS


@dataclass(slots=True)
class _Part:
    """One adapter at one layer; scaling and gain are in `b`."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    more: torch.Tensor | None = None  # [out], gain - 1, fp32


@dataclass(slots=True)
class _Layer:
    """What all adapters add to one linear module."""

    parts: dict[str, _Part] = field(default_factory=dict)
    stacked: tuple[tuple[str, ...], torch.Tensor, torch.Tensor, tuple[int, ...]] | None = None
    more: tuple[tuple[str, ...], torch.Tensor] | None = None
    """Of each row of a batch, [rows, 1, out]; zero where it is not DoRA."""
    hook: torch.utils.hooks.RemovableHandle | None = None


class Lora:
    """The adapters of one model. Not for training; dropout is left out as in eval mode."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._modules = dict(model.named_modules())
        self._dtype = dtype
        self._layers: dict[str, _Layer] = {}
        self._bytes: dict[str, int] = {}
        self._rows: tuple[str, ...] = ()
        self._active: tuple[str, ...] = ()
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._bytes

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter's tensors."""
        return self._bytes[digest]

    def gains(self, tensors: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
        """What DoRA multiplies each module's outputs by; nothing for LoRA. Reads weights only: any thread."""
        found = {}
        for name, magnitude in tensors.items():
            if not name.endswith(f".{MAGNITUDE}"):
                continue
            key = name.removesuffix(MAGNITUDE)
            module = key.removeprefix("base_model.model.").rstrip(".")
            weight = dora.plain_weight(self._modules[module])
            a, b = (tensors[f"{key}lora_{part}.weight"].to(weight.device) for part in "AB")
            found[module] = magnitude.to(weight.device, torch.float32) / dora.sizes(weight, a, b, scaling)
            if not torch.isfinite(found[module]).all():
                raise rejected(WEIGHTS, f"check 'values': {name!r} divided by the size of its weights is not finite")
        return found

    def add(
        self, digest: str, tensors: dict[str, torch.Tensor], scaling: float, gains: Mapping[str, torch.Tensor]
    ) -> int:
        """Takes an adapter's checked tensors ("base_model.model.MODULE.lora_A.weight"); returns the bytes held."""
        total = 0
        for name, tensor_a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            where = self._modules[module].weight.device
            a = tensor_a.to(where, self._dtype).contiguous()
            b = tensors[name.replace(".lora_A.", ".lora_B.")].to(where, torch.float32)
            gain = gains.get(module)
            more = None if gain is None else gain - 1
            b = (b * scaling if gain is None else b * scaling * gain[:, None]).to(self._dtype).contiguous()
            layer = self._layers.setdefault(module, _Layer())
            layer.parts[digest] = _Part(a, b, more)
            if layer.hook is None:
                layer.hook = self._modules[module].register_forward_hook(self._adder(layer))
            total += a.nbytes + b.nbytes + (0 if more is None else more.nbytes)
        self._bytes[digest] = total
        return total

    def remove(self, digest: str) -> int:
        """Frees an adapter that no row uses; returns the bytes of its tensors."""
        for name, layer in list(self._layers.items()):
            layer.parts.pop(digest, None)
            if layer.stacked is not None and digest in layer.stacked[0]:
                layer.stacked = None
            if layer.more is not None and digest in layer.more[0]:
                layer.more = None
            if not layer.parts and layer.hook is not None:
                layer.hook.remove()
                del self._layers[name]
        if digest in self._active:
            self.choose(())
        return self._bytes.pop(digest)

    def choose(self, rows: Sequence[str]) -> None:
        """Says which adapter each row of the next forwards has; "" = the base alone."""
        rows = tuple(rows)
        if rows == self._rows:
            return
        self._rows = rows
        self._active = tuple(sorted(set(rows) - {""}))
        self._masks = {}

    def _adder(self, layer: _Layer):
        def add(module, inputs, output):
            if not self._active:
                return output
            active = tuple(d for d in self._active if d in layer.parts)
            if not active:
                return output
            x = inputs[0].to(self._dtype)
            if len(active) == 1 and all(row == active[0] for row in self._rows):
                part = layer.parts[active[0]]
                more = part.more
                delta = functional.linear(functional.linear(x, part.a), part.b)
            else:
                a, b, ranks = self._stack(layer, active)
                inner = functional.linear(x, a)
                mask = self._mask(active, ranks, inner.device)
                delta = functional.linear(torch.where(mask, inner, inner.new_zeros(())), b)
                more = self._more(layer)
            if more is None:
                return output + delta.to(output.dtype)
            made = output if module.bias is None else output - module.bias
            return (output + delta + more * made).to(output.dtype)

        return add

    def _stack(self, layer: _Layer, active: tuple[str, ...]):
        if layer.stacked is None or layer.stacked[0] != active:
            parts = [layer.parts[d] for d in active]
            ranks = tuple(p.a.shape[0] for p in parts)
            layer.stacked = (active, torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1), ranks)
        return layer.stacked[1], layer.stacked[2], layer.stacked[3]

    def _more(self, layer: _Layer) -> torch.Tensor | None:
        own = [layer.parts[row].more if row in layer.parts else None for row in self._rows]
        some = next((more for more in own if more is not None), None)
        if some is None:
            return None
        if layer.more is None or layer.more[0] != self._rows:
            rows = torch.stack([torch.zeros_like(some) if more is None else more for more in own])
            layer.more = (self._rows, rows[:, None, :])
        return layer.more[1]

    def _mask(self, active: tuple[str, ...], ranks: tuple[int, ...], device) -> torch.Tensor:
        """[rows, 1, sum of ranks]: whether a row's adapter made this column."""
        key = (*ranks, -1, *(self._active.index(d) for d in active))
        if key not in self._masks:
            own = [[row == digest for digest, rank in zip(active, ranks, strict=True) for _ in range(rank)]
                   for row in self._rows]  # fmt: skip
            self._masks[key] = torch.tensor(own, device=device)[:, None, :]
        return self._masks[key]
