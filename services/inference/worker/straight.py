"""Decoders of Llama's kind, written out: as few steps from tokens to logits as there are.

Law of this room: taken only where every part is of a kind that is known here, and a probe has seen that it
gives what the model's own code gives (see proof). The weights are the model's own. A layer's matrices that
read the same input are one product, and so are those of the adapters at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from services.inference.worker import attention, linears
from services.inference.worker.flat import Flat
from services.inference.worker.gates import Gates
from services.inference.worker.lora import Lora, Site

_MODELS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})


@dataclass(frozen=True, slots=True)
class _Step:
    """A linear and the adapters at it."""

    linear: linears.Linear
    site: Site


@dataclass(frozen=True, slots=True)
class _Layer:
    before: torch.Tensor
    """Weights of the norm before attention."""
    qkv: _Step
    o: _Step
    after: torch.Tensor
    """Weights of the norm before the gates."""
    gates: Gates
    down: _Step
    window: int


class Straight:
    """A model of Llama's kind. Made by `of`."""

    def __init__(self, model: Any, lora: Lora) -> None:
        config, inner = model.config, model.model
        first = inner.layers[0].self_attn
        self._embed, self._rotary, self._head = inner.embed_tokens, inner.rotary_emb, linears.of([model.lm_head])
        self._norm, self._eps = inner.norm.weight, inner.norm.variance_epsilon
        self._width, self._scale = first.head_dim, first.scaling
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._lora = lora
        self._layers = [self._layer(f"model.layers.{n}", layer, config) for n, layer in enumerate(inner.layers)]

    def _layer(self, name: str, layer: Any, config: Any) -> _Layer:
        at, mlp = layer.self_attn, layer.mlp
        window = getattr(at, "sliding_window", None)
        if type(at).__name__ == "MistralAttention":
            window = getattr(config, "sliding_window", None)
        return _Layer(
            layer.input_layernorm.weight,
            self._step(f"{name}.self_attn", at, "q_proj", "k_proj", "v_proj"),
            self._step(f"{name}.self_attn", at, "o_proj"),
            layer.post_attention_layernorm.weight,
            Gates(f"{name}.mlp", mlp, self._lora),
            self._step(f"{name}.mlp", mlp, "down_proj"),
            window or 0,
        )

    def _step(self, name: str, owner: Any, *parts: str) -> _Step:
        return _Step(linears.of([getattr(owner, p) for p in parts]), self._lora.site(*(f"{name}.{p}" for p in parts)))

    def __call__(self, flat: Flat) -> torch.Tensor:
        hidden = self._embed(flat.ids)
        cos, turn = self._turning(hidden, flat.positions)
        for number, layer in enumerate(self._layers):
            hidden = self._through(flat, number, layer, hidden, cos, turn)
        if flat.picked is not None:
            hidden = hidden[flat.picked]
        return self._head(self._normed(hidden, self._norm)).float()

    def _through(
        self, flat: Flat, number: int, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, turn: torch.Tensor
    ) -> torch.Tensor:
        tokens, width = hidden.shape[0], self._width
        qkv = self._made(layer.qkv, self._normed(hidden, layer.before)).view(tokens, -1, width)
        both = self._heads + self._shared
        turned = qkv[:, :both]
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), turn)
        attention.store(flat, number, turned[:, self._heads :], qkv[:, both:])
        found = attention.look(flat, number, turned[:, : self._heads].contiguous(), self._scale, layer.window)
        hidden = self._made(layer.o, found.reshape(tokens, -1), hidden)
        return self._made(layer.down, layer.gates(self._normed(hidden, layer.after)), hidden)

    def _made(self, step: _Step, x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        return self._lora.through(step.site, step.linear, x, there)

    def _turning(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By what heads and their rolled halves are multiplied, [tokens, 1, width] each."""
        cos, sin = self._rotary(hidden[None], positions[None])
        half = cos.shape[-1] // 2
        turn = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        return cos[0][:, None], turn[:, None]

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self._eps)


def of(model: Any, lora: Lora) -> Straight | None:
    """The model written out; None where a part is not of a kind known here."""
    if type(model).__name__ not in _MODELS or model.config.hidden_act != "silu":
        return None
    for layer in model.model.layers:
        if type(layer.mlp).__name__ not in ("LlamaMLP", "MistralMLP", "Qwen2MLP"):
            return None
    if model.config.hidden_size // model.config.num_attention_heads != model.model.layers[0].self_attn.head_dim:
        return None
    return Straight(model, lora)
