"""What the device of a run can do, found by asking it.

Law of this room: asks and tells; decides nothing (see services/trainer/plan.py).
"""

from __future__ import annotations

import importlib.util

import psutil
import torch

from services.common.worker.bfloat import has_bf16
from services.trainer.plan import DeviceFacts


def gather(device: str) -> DeviceFacts:
    """The facts of a device such as "cuda:0"."""
    kind = device.partition(":")[0]
    there = importlib.util.find_spec("bitsandbytes") is not None
    bf16 = has_bf16(device)
    if kind == "cuda":
        return DeviceFacts(kind, torch.cuda.get_device_properties(device).total_memory, bf16, there)
    return DeviceFacts(kind, psutil.virtual_memory().total, bf16, there and kind != "mps")
