"""Linear layers of 8 and 4 bits for processors.

Law of this room: made from plain weights, in place of torch's linear modules, one at a time. A token's outputs
depend on its own inputs, never on another's: inputs are rounded row by row. How a product is made depends on
the number of tokens, so the last digits of an output depend on how many others there are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from services.common.worker import dora

_GROUP = 32
_MULTIPLE = 64
"""Both sizes of a matrix of 4 bits; others are held in 8."""
_LEAST = 1e-8
_FEW_NF4, _MANY_INT4 = 16, 80
_FEW, _MANY = 8, 128
"""Tokens up to which a product is quickest with plain inputs and small weights, and with both small; beyond, with
weights made large again."""


class Int8(nn.Module):
    """Weights of 8 bits with a scale for each output; of some tokens at once, inputs too, a scale for each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        whole = weight.float()
        scale = whole.abs().amax(1).clamp_(min=_LEAST) / 127
        self.register_buffer("quantized", (whole / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def joined(cls, modules: list[Int8]) -> Int8:
        """Modules that read the same input, as one; each keeps a view of its part."""
        whole = _unfilled(cls, modules)
        whole.register_buffer("quantized", torch.cat([m.quantized for m in modules]))
        whole.register_buffer("scale", torch.cat([m.scale for m in modules]))
        begin = 0
        for module in modules:
            end = begin + module.out_features
            module.quantized, module.scale = whole.quantized[begin:end], whole.scale[begin:end]
            begin = end
        return whole

    @property
    def dequantized(self) -> torch.Tensor:
        """The weights as they count, fp32."""
        return self.quantized * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= _FEW:
            made = torch._weight_int8pack_mm(flat.to(torch.bfloat16), self.quantized, self.scale.to(torch.bfloat16))
        elif len(flat) <= _MANY:
            made = self._rounded(flat.float())
        else:
            weight = self.quantized.to(torch.bfloat16)
            made = nn.functional.linear(flat.to(torch.bfloat16), weight) * self.scale
        if self.bias is not None:
            made = made + self.bias
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The product with inputs of 8 bits too."""
        scale = x.abs().amax(1, keepdim=True).clamp_(min=_LEAST) / 127
        small = (x / scale).round_().to(torch.int8)
        return torch._int_mm(small, self.quantized.t()).float().mul_(scale).mul_(self.scale)


class Int4(nn.Module):
    """Weights of 4 bits with a scale and a zero for each group of 32 inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        groups = weight.float().view(self.out_features, -1, _GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp_(min=_LEAST) / 15
        # The kernel's own formula is (number - 8) * scale + zero, with both in bfloat16.
        scale = scale.to(torch.bfloat16).float()
        zero = (low + 8 * scale).to(torch.bfloat16).float()
        numbers = ((groups - zero) / scale).round_().add_(8).clamp_(0, 15)
        whole = numbers.view(self.out_features, self.in_features).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        both = torch.cat([scale, zero], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        self.register_buffer("quantized", packed)
        self.register_buffer("scale_and_zero", both)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def dequantized(self) -> torch.Tensor:
        """The weights as they count, fp32."""
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._product(eye).float().t().contiguous()

    @classmethod
    def joined(cls, modules: list[Int4]) -> Int4:
        """Modules that read the same input, as one; each keeps a view of its part."""
        whole = _unfilled(cls, modules)
        whole.register_buffer("quantized", torch.cat([m.quantized for m in modules]))
        whole.register_buffer("scale_and_zero", torch.cat([m.scale_and_zero for m in modules], dim=1))
        begin = 0
        for module in modules:
            end = begin + module.out_features
            module.quantized, module.scale_and_zero = whole.quantized[begin:end], whole.scale_and_zero[:, begin:end]
            begin = end
        return whole

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > _MANY_INT4 and _has_known_layout():
            return x @ self.plain()
        scales = self.scale_and_zero.contiguous()  # of a part they are a view
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.quantized, _GROUP, scales)

    def plain(self) -> torch.Tensor:
        """The weights [in, out] in bfloat16, where a processor's layout is the known one.

        Of each 64 outputs a byte holds one of the first 32 in its low half, and the one 32 further in its high half.
        """
        blocks, groups = self.out_features // 64, self.in_features // _GROUP
        halves = self.quantized.view(blocks, self.in_features, 32)
        made = torch.empty((self.in_features, blocks, 2, 32), dtype=torch.bfloat16)
        made[:, :, 0] = (halves & 15).sub_(8).view(torch.int8).transpose(0, 1)
        made[:, :, 1] = (halves >> 4).sub_(8).view(torch.int8).transpose(0, 1)
        scale, zero = (self.scale_and_zero[..., n].reshape(groups, 1, -1) for n in range(2))
        made = made.view(groups, _GROUP, self.out_features)
        return torch.addcmul(zero, made, scale, out=made).view(self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self._product(x.reshape(-1, self.in_features).to(torch.bfloat16))
        if self.bias is not None:
            made += self.bias
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _unfilled(kind: type[nn.Module], modules: list[Any]) -> Any:
    """A module of the size of several together, with their biases, without weights."""
    whole: Any = nn.Module.__new__(kind)
    nn.Module.__init__(whole)
    whole.in_features, whole.out_features = modules[0].in_features, sum(m.out_features for m in modules)
    biases = [m.bias for m in modules]
    whole.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
    return whole


@functools.cache
def _has_known_layout() -> bool:
    """Whether this processor's kernel lays weights of 4 bits out as `Int4.plain` reads them."""
    sample = Int4(torch.linspace(-1, 1, 128 * 64).view(128, 64).sin(), None)
    return torch.allclose(sample.plain().float().t(), sample.dequantized, atol=0.02)


class Nf4(nn.Module):
    """Weights of bitsandbytes, held twice: as it multiplies few tokens by them, and as it makes them plain for many."""

    def __init__(self, module: Any) -> None:
        import bitsandbytes.functional as bnb

        super().__init__()
        self.out_features, self.in_features, self.bias = module.out_features, module.in_features, None
        self.module, self._product = module, bnb.gemv_4bit
        self._state = _state_for_few(module.weight.quant_state)
        shape = (self.out_features, self.in_features)
        self.register_buffer("packed", _bytes_for_few(module.weight.data, shape), persistent=False)

    @property
    def held_bytes(self) -> int:
        """Bytes beside the buffers: the scales of the second form."""
        return self._state.absmax.nbytes

    @property
    def dequantized(self) -> torch.Tensor:
        """The weights as they count."""
        return dora.plain_weight(self.module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        if len(flat) > _FEW_NF4:
            return self.module(x)
        made = self._product(flat.to(torch.bfloat16), self.packed, state=self._state)
        if self.module.bias is not None:
            made = made + self.module.bias
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _bytes_for_few(weight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The bytes of NF4 weights as the product of few tokens wants them: of each 32 outputs, those 16 apart share one.

    The library's own way makes 32-bit numbers of them first and takes several times as long.
    """
    outs, ins = shape
    lines = weight.view(torch.uint8).view(outs // 32, 32, ins // 2).transpose(1, 2).contiguous()
    low, high = lines[..., :16], lines[..., 16:]
    made = torch.empty((outs // 32, ins // 2, 16, 2), dtype=torch.uint8)
    torch.bitwise_or(high & 0xF0, low >> 4, out=made[..., 0])
    torch.bitwise_or((high & 0xF) << 4, low & 0xF, out=made[..., 1])
    return made.view(outs, ins // 2)


def _state_for_few(state: Any) -> Any:
    """Scales of NF4 weights as the product of few tokens wants them: plain, input by input, in bfloat16."""
    import bitsandbytes.functional as bnb

    made = copy.copy(state)
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    outs, ins = state.shape
    made.absmax = scales.float().view(outs, ins // state.blocksize).T.to(torch.bfloat16).contiguous()
    made.nested, made.state2, made.offset = False, None, None
    made.dtype, made.packing_format_for_cpu = torch.bfloat16, True
    return made


def twice(model: nn.Module) -> None:
    """Holds every NF4 module of a size that allows it in both forms, where the processor has the products for it."""
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        return
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if type(module) is bnb.nn.Linear4bit and not module.out_features % 32 and not module.in_features % 64:
                setattr(owner, name, Nf4(module))


def pack(model: nn.Module, bits: int, empty: bool = False) -> None:
    """Puts small weights in place of the plain ones of every linear module; `empty` ones without numbers yet.

    The output layer is held in 8 bits at least; where it shares its weights with the embedding it stays as it is.
    """
    tied = model.get_output_embeddings()
    shared = bool(getattr(model.config, "tie_word_embeddings", False))
    for owner, name, module in list(_linears(model)):
        if module is tied and shared:
            continue
        fits = module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
        kind = Int4 if bits == 4 and fits and module is not tied else Int8
        weight = torch.zeros_like(module.weight, device="cpu") if empty else module.weight.data
        bias = torch.zeros_like(module.bias, device="cpu") if empty and module.bias is not None else module.bias
        setattr(owner, name, kind(weight, bias))


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for owner in model.modules():
        for name, module in owner.named_children():
            if type(module) is nn.Linear:
                yield owner, name, module
