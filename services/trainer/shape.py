"""What a model is made of, as far as its cost goes: from config.json and the headers of its files.

Law of this room: pure. No weight is read; what config.json leaves out is found in
the tensors' shapes or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_FFN = ("intermediate_size", "n_inner", "ffn_dim")
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module that quantisation and LoRA can touch."""

    name: str
    """Its short name, as in "q_proj"."""
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    """Width of one head."""
    ffn: int
    vocabulary: int
    gated: bool
    """Whether the feed-forward part multiplies by a gate."""
    linears: tuple[Linear, ...]
    """Every one of them, layer by layer."""
    others: int
    """Weights of embeddings, norms, biases and the head; those shared count once."""
    file_width: int
    """Bytes of a number in the files."""

    @property
    def weights(self) -> int:
        """Weights in all."""
        return self.others + sum(m.weights for m in self.linears)


def shape_of(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], modules: Collection[str], file_width: int
) -> ModelShape:
    """The shape of a model; `modules` are the short names LoRA can target. ValueError names what config.json lacks."""
    hidden, heads = _number(config, _HIDDEN), _number(config, _HEADS)
    tied = bool(config.get("tie_word_embeddings", True))
    linears, others = [], 0
    for name, shape in sorted(tensors.items()):
        short = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith(".weight") and len(shape) == 2 and short in modules:
            linears.append(Linear(short, *shape))
        elif not (tied and name == _HEAD):
            others += math.prod(shape)
    widest = max((m.outputs for m in linears), default=4 * hidden)
    return ModelShape(
        layers=_number(config, _LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(config, ("num_key_value_heads",), heads),
        head=_number(config, ("head_dim",), hidden // heads),
        ffn=_number(config, _FFN, widest),
        vocabulary=_number(config, ("vocab_size",)),
        gated=any(m.name in ("gate_proj", "gate_up_proj") for m in linears),
        linears=tuple(linears),
        others=others,
        file_width=file_width,
    )


def _number(config: Mapping[str, Any], keys: tuple[str, ...], otherwise: int = 0) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    if otherwise:
        return otherwise
    raise ValueError(f"config.json lacks {' or '.join(keys)}")
