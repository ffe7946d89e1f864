"""The header of a safetensors file: names, types and shapes, without a tensor.

Law of this room: reads a stranger's bytes, so call it in a worker, or on files
of our own sealing. Everything is bounded and checked: size of the header, range
and size of every tensor, no gap and no overlap.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from dataclasses import dataclass

from services.common.errors import rejected

MAX_HEADER = 100 << 20
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of a number, at least 1."""
        return max(1, _BITS[self.dtype] // 8)


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of a file by name; REJECTED naming what is wrong."""
    size = os.path.getsize(path)
    with path.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise rejected(path.name, "is too short for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > min(MAX_HEADER, size - 8):
            raise rejected(path.name, f"announces a header of {length} bytes in a file of {size}: not safetensors")
        try:
            tree = json.loads(f.read(length))
        except (ValueError, RecursionError):
            raise rejected(path.name, "has a header that is not JSON: not safetensors") from None
    if not isinstance(tree, dict):
        raise rejected(path.name, "has a header that is not an object")
    tree.pop("__metadata__", None)
    found: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in tree.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (TypeError, KeyError, ValueError):
            raise rejected(path.name, f"tensor {name[:80]!r} lacks dtype, shape or data_offsets") from None
        if dtype not in _BITS or any(n < 0 for n in shape):
            raise rejected(path.name, f"tensor {name[:80]!r} has type {dtype[:20]!r} and shape {shape[:8]}")
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise rejected(path.name, f"tensor {name[:80]!r} has {end - begin} bytes, which its shape does not give")
        found[name] = TensorInfo(dtype, shape)
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise rejected(path.name, f"tensor {name[:80]!r} begins at {begin}, not at {at}")
        at = end
    if at != size - 8 - length:
        raise rejected(path.name, f"holds {size - 8 - length} bytes of data; its header tells of {at}")
    return found


def read_model_headers(payload: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, all shards together."""
    found: dict[str, TensorInfo] = {}
    for path in sorted(payload.glob("*.safetensors")):
        for name, info in read_header(path).items():
            if name in found:
                raise rejected(path.name, f"tensor {name[:80]!r} stands in two files")
            found[name] = info
    return found
