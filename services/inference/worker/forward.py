"""What a model makes of a forward: hidden states, then logits of the tokens that were asked for.

Law of this room: `Whole` runs transformers' own model code, so every family works whose attention
goes through transformers' table of attentions; keys, values and the looking back are ours. Nothing
here knows of requests.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.inference.worker import attention
from services.inference.worker.flat import Flat


class Forward(Protocol):
    """A model that can be asked."""

    def __call__(self, flat: Flat) -> torch.Tensor:
        """Logits [picked tokens, vocabulary], fp32. Writes keys and values into the rows' places."""
        ...


class Whole:
    """Transformers' code for all but attention."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = _Bridge()
        name = f"qlorad_rows_{id(self):x}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._cache.look)
        self._own, self._ours = model.config._attn_implementation, name

    def __call__(self, flat: Flat) -> torch.Tensor:
        self._cache.flat = flat
        self._model.config._attn_implementation = self._ours
        try:
            out = self._model(
                input_ids=flat.ids[None],
                position_ids=flat.positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if flat.picked is None else flat.picked,
            )
        finally:
            self._model.config._attn_implementation = self._own
        return out.logits[0].float()


class _Bridge(Cache):
    """What transformers' model code takes for a cache: it stores, and the attention reads."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.flat: Flat
        self._layer = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self._layer = layer_idx
        attention.store(self.flat, layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states

    def look(self, module, query, key, value, attention_mask=None, **told):
        """An attention of transformers' table."""
        if told.get("softcap") is not None or told.get("s_aux") is not None or told.get("dropout"):
            raise ValueError(f"{type(module).__name__} caps its scores, or has sinks; this engine does neither")
        if not getattr(module, "is_causal", True):
            raise ValueError(f"{type(module).__name__} looks ahead")
        scale = told.get("scaling") or query.shape[-1] ** -0.5
        window = told.get("sliding_window") or 0
        asked = query[0].transpose(0, 1).contiguous()
        return attention.look(self.flat, self._layer, asked, scale, window)[None], None

    # What some model code asks of a cache. Masks and positions are made here, so these only have to be true.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.flat.positions.max()) + 1 - len(self.flat.ids)

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def __len__(self) -> int:
        return 1
