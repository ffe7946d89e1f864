"""What a model's own code says to a fixed input, and how its keys and values are shaped.

Law of this room: the truth that every quicker way to compute the model is held against. It may be kept beside
quantised weights, which are the same numbers at each load.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Cache

from services.common.errors import rejected

TOKENS = 24
"""Of the fixed input."""
_FILE = "probe.safetensors"


@dataclass(frozen=True, slots=True)
class Said:
    """Logits of each token of the input, and heads and width of every layer's keys."""

    logits: torch.Tensor
    shapes: list[tuple[int, int]]

    def save(self, folder: pathlib.Path) -> None:
        """Writes it beside a model's weights."""
        tensors = {"logits": self.logits.cpu().contiguous()}
        save_file(tensors, folder / _FILE, metadata={"shapes": json.dumps(self.shapes)})

    @classmethod
    def load(cls, folder: pathlib.Path, device: str) -> Said:
        """What was saved."""
        with safe_open(folder / _FILE, framework="pt", device=device) as kept:
            shapes = json.loads(kept.metadata()["shapes"])
            return cls(kept.get_tensor("logits"), [(heads, width) for heads, width in shapes])


def ids(vocabulary: int) -> list[int]:
    """The input."""
    return [(7919 * n + 13) % vocabulary for n in range(TOKENS)]


def ask(model, vocabulary: int, name: str) -> Said:
    """Asks a model; REJECTED if what it says is no number, or if it is shaped as is not served here."""
    seen = _Shapes()
    asked = torch.tensor([ids(vocabulary)], dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        logits = model(input_ids=asked, past_key_values=seen, use_cache=True).logits[0].float()
    if not torch.isfinite(logits).all():
        raise rejected(name, "check 'values': its logits are not finite")
    return Said(logits, seen.told(name))


class _Shapes(Cache):
    """A cache that keeps nothing and learns what would be kept."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._seen: dict[int, tuple[int, int]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if key_states.shape != value_states.shape:
            raise ValueError("keys and values of different shapes are not served here")
        self._seen[layer_idx] = (key_states.shape[1], key_states.shape[3])
        return key_states, value_states

    def told(self, name: str) -> list[tuple[int, int]]:
        """Heads and width of every layer."""
        if sorted(self._seen) != list(range(len(self._seen))) or not self._seen:
            raise rejected(name, "check 'forward': not every layer keeps keys and values")
        return [self._seen[layer] for layer in range(len(self._seen))]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def __len__(self) -> int:
        return len(self._seen)
