"""Brings a sealed base model into memory, for training and for serving alike.

Law of this room: the one place that calls from_pretrained. Only safetensors,
never remote code, nothing from the network. A loaded base is frozen and in eval
mode; who trains switches modes.
"""

from __future__ import annotations

import pathlib
import sys
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig

from services.common.worker.libraries import spare_the_compiler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_base(
    payload: pathlib.Path,
    method: str = "nf4",
    double_quantization: bool = True,
    compute: str = "bf16",
    device: str = "cpu",
):
    """The model of a payload folder; `method` is "nf4", "int8" or "none", `compute` "bf16", "fp16" or "fp32".

    With nf4 and int8 the linear layers are quantised now and the rest is held in
    the compute type. Does not verify digests: the shelf does.
    """
    dtype = DTYPES[compute]
    quantization = None
    if method == "nf4":
        spare_the_compiler()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    elif method == "int8":
        spare_the_compiler()
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif method != "none":
        raise ValueError(f"method: got {method!r}; accepted: 'nf4', 'int8' or 'none'")
    with warnings.catch_warnings():
        # transformers warns of generation defaults and of a missing accelerator; neither concerns us.
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(payload, local_files_only=True, trust_remote_code=False)
        masked = (config.architectures or [""])[0].endswith("ForMaskedLM")
        model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(
            payload,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    keep_autograd(model)
    model.requires_grad_(False)
    model.eval()
    return model


def load_kept(payload: pathlib.Path, device: str):
    """A model whose NF4 weights were saved as they were quantised. Not for training's first load: see `load_base`."""
    spare_the_compiler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            payload,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    keep_autograd(model)
    model.requires_grad_(False)
    return model.eval()


def keep_autograd(model) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first eval forward on a CPU.

    The repacked weight has no autograd: after one evaluation most LoRA gradients
    are silently wrong, and a merge is garbage.
    """
    if "bitsandbytes" not in sys.modules:
        return  # nothing can be 4-bit then, and importing it costs most of a second
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def weight_bytes(model) -> int:
    """Bytes that the model's weights and buffers take in memory; of what is no plain tensor, the module tells."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        scales = getattr(tensor, "SCB", None)  # of int8: one for each output
        for part in [*_states(getattr(tensor, "quant_state", None)), *([] if scales is None else [scales])]:
            seen[part.data_ptr()] = part.numel() * part.element_size()
    return sum(seen.values()) + sum(getattr(module, "held_bytes", 0) for module in model.modules())


def _states(state) -> list[torch.Tensor]:
    if state is None:
        return []
    parts = [state.absmax, state.code]
    nested = getattr(state, "state2", None)
    if nested is not None:
        parts += [nested.absmax, nested.code, state.offset]
    return [p for p in parts if isinstance(p, torch.Tensor)]
