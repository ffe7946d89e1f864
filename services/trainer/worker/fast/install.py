"""Which parts of a model are computed by this room's own forward and backward, and which are left as they are.

Law of this room: a part is taken over only where its kind is known and a probe has seen that
the model makes of packed samples what it made before; what is left alone is told, with the reason.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlorad.v1 import trainer_pb2
from services.trainer.worker.fast import attention, layers, linears

_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"})
_ATTENTIONS = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention"})
_GATED = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP"})
_PROBE_TOKENS = 6
_NEAR = 0.99
"""Cosine between what the model made of each token before and after; a leak between samples gives less by far."""


def install(model: Any, spec: trainer_pb2.TrainSpec) -> str:
    """Takes over what it can of a model with LoRA weights; returns why nothing was, or nothing."""
    why = _hindrance(model, spec)
    if why:
        return why
    base = model.get_base_model()
    ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.registered)
    was_training = model.training
    model.eval()
    before = _probed(base)
    base.config._attn_implementation = attention.NAME
    taken = [module for module in base.modules() if _take(module)]
    try:
        near = float(F.cosine_similarity(before, _probed(base), dim=-1).min())
        why = "" if near > _NEAR else f"a probe gave something else: cosine {near:.4f}"
    except (ValueError, TypeError, RuntimeError) as error:
        why = str(error)
    if why:
        base.config._attn_implementation = "sdpa"
        for module in taken:
            del module.forward
    model.train(was_training)
    return why


def _take(module: Any) -> bool:
    """Gives a module this room's forward, if it is of a kind that has one."""
    kind, forward = type(module).__name__, None
    if kind in _NORMS and not module.weight.requires_grad:
        forward = _norm
    elif kind in _ATTENTIONS and not module.attention_dropout:
        forward = _attention(module)
    elif kind in _GATED and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        forward = _gated(module)
    elif hasattr(module, "lora_A"):
        forward = _linear(module)
    if forward is not None:
        module.forward = types.MethodType(forward, module)
    return forward is not None


@torch.no_grad()
def _probed(base: Any) -> torch.Tensor:
    """What the decoder makes of two samples in one sequence."""
    device = next(base.parameters()).device
    ids = (torch.arange(5, 5 + 2 * _PROBE_TOKENS, device=device) % base.config.vocab_size)[None]
    positions = torch.arange(_PROBE_TOKENS, device=device).repeat(2)[None]
    return base.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()


def _hindrance(model: Any, spec: trainer_pb2.TrainSpec) -> str:
    config = model.get_base_model().config
    if next(model.parameters()).device.type != "cpu":
        return "written for processors, not for this device"
    if spec.parallelism.zero_stage == 3:
        return "ZeRO-3 gathers weights by the modules' own forward"
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}"
    window = getattr(config, "sliding_window", None)
    if window and window < spec.data.max_length_tokens:
        return f"attention looks back {window} tokens only"
    if not getattr(config, "is_decoder", False) and "ForCausalLM" not in "".join(config.architectures or ()):
        return "the model is no decoder"
    return ""


def _group(*modules: Any) -> tuple[linears.Linear, ...] | None:
    """Modules of which every one is known here."""
    known = [linears.of(m) for m in modules]
    whole = tuple(one for one in known if one is not None)
    return whole if len(whole) == len(modules) else None


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return layers.Norm.apply(hidden_states, module.weight, module.variance_epsilon)


def _linear(module: Any) -> Callable[..., Any] | None:
    one = linears.of(module)
    if one is None:
        return None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return linears.apply((one,), x, self.training)[0]

    return forward


def _gated(module: Any) -> Callable[..., Any] | None:
    group = _group(module.gate_proj, module.up_proj, module.down_proj)
    if group is None:
        return None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        trained = [w for one in group for w in one.trained]
        return layers.Gated.apply(x, group, self.training, *trained)

    return forward


def _attention(module: Any) -> Callable[..., Any] | None:
    group = _group(module.q_proj, module.k_proj, module.v_proj)
    if group is None:
        return None
    own = module.forward

    def forward(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, **told: Any
    ) -> tuple[torch.Tensor, None]:
        cos, sin = position_embeddings
        if attention_mask is not None or told.get("past_key_values") is not None or cos.shape[-1] != self.head_dim:
            return own(hidden_states, position_embeddings, attention_mask, **told)
        rows, length = hidden_states.shape[:2]
        q, k, v = (t.view(rows * length, -1, self.head_dim) for t in linears.apply(group, hidden_states, self.training))
        cos, sin = (t.expand(rows, length, -1).reshape(rows * length, -1) for t in (cos, sin))
        spans = attention.spans_of(told["position_ids"], rows, length)
        made = attention.Rotated.apply(q, k, v, cos, sin, spans, self.scaling)
        return self.o_proj(made.view(rows, length, -1)), None

    return forward
