"""Strangers' JSON, read within bounds.

Law of this room: nothing is believed. Sizes are checked before reading, depth
before parsing. Every refusal is a Fault REJECTED that names the file.
"""

import json
import pathlib
from typing import Any

from services.common.errors import rejected

JSON_BYTES = 4 << 20
TOKENIZER_BYTES = 128 << 20
DEPTH = 64


def depth_of(data: bytes) -> int:
    """How deep brackets nest outside strings."""
    deepest = depth = 0
    quoted = escaped = False
    for byte in data:
        if quoted:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                quoted = False
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """Bytes as a JSON object without doubled keys."""
    if data.count(b"[") + data.count(b"{") > DEPTH and depth_of(data) > DEPTH:
        raise rejected(name, f"nests deeper than {DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise rejected(name, "names a key twice")
        return made

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise rejected(name, f"is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise rejected(name, "is not a JSON object")
    return value


def read_object(path: pathlib.Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A file as a JSON object of bounded size."""
    size = path.stat().st_size
    if size > limit:
        raise rejected(path.name, f"has {size} bytes; accepted: at most {limit}")
    return parse_object(path.name, path.read_bytes())
