"""What the device of a run can do, found by asking it.

Law of this room: asks and tells; decides nothing (see services/trainer/plan.py).
"""

from __future__ import annotations

import importlib.util
import platform

import psutil
import torch

from services.trainer.plan import DeviceFacts


def gather(device: str) -> DeviceFacts:
    """The facts of a device such as "cuda:0"."""
    kind = device.partition(":")[0]
    there = importlib.util.find_spec("bitsandbytes") is not None
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        major, _ = torch.cuda.get_device_capability(device)
        return DeviceFacts(kind, memory, major >= 8, there)
    memory = psutil.virtual_memory().total
    if kind == "mps":
        return DeviceFacts(kind, memory, torch.backends.mps.is_macos_or_newer(14, 0), False)
    return DeviceFacts(kind, memory, _cpu_bf16(), there)


def _cpu_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
