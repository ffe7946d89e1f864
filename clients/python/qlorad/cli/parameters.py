"""Parameters of a plug-in as one line of a table."""

from __future__ import annotations

import json


def told(schema_json: str) -> str:
    """Each with its default, as in "name=1, other (needed)"."""
    schema = json.loads(schema_json)
    parts = []
    for name, rules in schema["properties"].items():
        default = f"={json.dumps(rules['default'], ensure_ascii=False)}" if "default" in rules else " (needed)"
        parts.append(name + default)
    return ", ".join(parts)
