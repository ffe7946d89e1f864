"""Whether a device computes in bfloat16 as quickly as in float32.

Law of this room: asks the device; one answer for training and serving.
"""

from __future__ import annotations

import platform

import torch


def has_bf16(device: str) -> bool:
    """Of a device such as "cuda:0"; a slow emulation does not count."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if kind == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
