"""A base's weights in the precision that was chosen, from the sealed model or from what was kept of a load before.

Law of this room: both ways give the same numbers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlorad.v1 import inference_pb2
from services.common.worker.bfloat import has_bf16
from services.common.worker.load import load_base, load_kept
from services.inference.worker import packed, reordered
from services.inference.worker.prepared import Prepared
from services.inference.worker.said import Said

_FILE = "weights.safetensors"
_BITS = {inference_pb2.PRECISION_INT8: 8, inference_pb2.PRECISION_INT4: 4}
_PLAIN = {inference_pb2.PRECISION_BF16: "bf16", inference_pb2.PRECISION_FP32: "fp32"}


@dataclass(frozen=True, slots=True)
class Brought:
    """A model in eval mode, what its own code says to the probe, and whether both were kept from before."""

    model: Any
    said: Said
    from_kept: bool


def bring(
    payload: pathlib.Path,
    precision: inference_pb2.Precision.ValueType,
    device: str,
    kept: Prepared,
    ask: Callable[[Any], Said],
) -> Brought:
    """The model; `ask` has it answer the probe where no answer was kept with the weights."""
    if precision in _PLAIN:
        model = load_base(payload, "none", True, _PLAIN[precision], device)
        if reordered.pays(model) and has_bf16(device):
            reordered.reorder(model)
        return Brought(model, ask(model), False)
    there = kept.find()
    if there is not None:
        try:
            said = Said.load(there, device)
            if precision in _BITS:
                return Brought(_unpacked(payload, there, _BITS[precision]), said, True)
            return Brought(_both(load_kept(there, device), device), said, True)
        except Exception as error:  # whatever reading them raises: they only save time
            kept.drop(error)
    model = load_base(payload, "none" if precision in _BITS else "nf4", True, "bf16", device)
    if precision in _BITS:
        packed.pack(model, _BITS[precision])
    said = ask(model)

    def write(folder: pathlib.Path) -> None:
        if precision in _BITS:
            save_file(_tensors(model), folder / _FILE)
        else:
            model.save_pretrained(folder)
        said.save(folder)

    kept.keep(write)
    return Brought(model if precision in _BITS else _both(model, device), said, False)


def _both(model: Any, device: str) -> Any:
    """NF4 as processors need it."""
    if device == "cpu":
        packed.twice(model)
    return model


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor that the model's code does not make by itself; what is shared, once."""
    seen: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            found[name] = tensor.contiguous()
    return found


def _unpacked(payload: pathlib.Path, kept: pathlib.Path, bits: int) -> Any:
    """The model around kept weights; none of its plain ones is ever read."""
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(payload, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    packed.pack(model, bits, empty=True)
    found = model.load_state_dict(load_file(kept / _FILE), strict=False, assign=True)
    model.tie_weights()
    # What is shared was kept once, by the first of its names.
    own = {id(model.get_input_embeddings().weight)} if getattr(config, "tie_word_embeddings", False) else set()
    missing = [name for name in found.missing_keys if id(model.get_parameter(name)) not in own]
    if missing or found.unexpected_keys:
        raise ValueError(f"kept weights do not fit: {[*missing, *found.unexpected_keys][0]}")
    model.requires_grad_(False)
    return model.eval()
