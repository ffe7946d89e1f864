"""LoRA weights on a frozen base.

Law of this room: nothing but LoRA weights trains (with DoRA, magnitudes too), and they are fp32.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from qlorad.v1 import trainer_pb2
from services.common.worker.adapter import is_trained


def with_lora(base, spec: trainer_pb2.TrainSpec):
    """The base with LoRA weights in fp32 on the chosen modules."""
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=sorted(spec.lora.target_modules.names),
        use_rslora=spec.lora.rslora,
        use_dora=spec.lora.dora,
        bias="none",
        task_type="CAUSAL_LM" if hasattr(base, "prepare_inputs_for_generation") else None,
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_trained(name), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name
    if spec.memory.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
