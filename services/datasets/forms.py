"""The forms of rows: their names and fields.

Law of this room: words only. How a form is read stands in worker/forms.py,
how it is written in writing.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TypeAlias

from qlorad.v1 import datasets_pb2

Form: TypeAlias = "datasets_pb2.RowFormat.ValueType"

CHAT = datasets_pb2.ROW_FORMAT_CHAT
INSTRUCTION = datasets_pb2.ROW_FORMAT_INSTRUCTION
COMPLETION = datasets_pb2.ROW_FORMAT_COMPLETION
TEXT = datasets_pb2.ROW_FORMAT_TEXT
SHAREGPT = datasets_pb2.ROW_FORMAT_SHAREGPT
PREFERENCE = datasets_pb2.ROW_FORMAT_PREFERENCE
INFILL = datasets_pb2.ROW_FORMAT_INFILL
CANONICAL = datasets_pb2.ROW_FORMAT_CANONICAL
PAPER = datasets_pb2.ROW_FORMAT_PAPER

# Forms that are read and written. Every field that a form knows. Also the order in which forms are sniffed.
FORMS: Mapping[Form, tuple[str, ...]] = {
    CANONICAL: (),
    PREFERENCE: ("prompt", "chosen", "rejected", "system", "tools"),
    CHAT: ("messages", "tools"),
    SHAREGPT: ("conversations", "system", "tools"),
    INSTRUCTION: ("instruction", "output", "input", "system", "history"),
    INFILL: ("prefix", "middle", "suffix"),
    COMPLETION: ("prompt", "completion"),
    TEXT: ("text",),
}
# Those that are only read: several examples are made of one row, and no row of an example.
ONLY_READ: Mapping[Form, tuple[str, ...]] = {
    PAPER: ("title", "abstract", "sections", "authors", "quality_score", "year", "doi"),
}
FIELDS: Mapping[Form, tuple[str, ...]] = {**FORMS, **ONLY_READ}
# Those without which a row is not of the form, or is not taken for it where no form is told.
REQUIRED: Mapping[Form, tuple[str, ...]] = {
    CANONICAL: (),
    PREFERENCE: ("chosen", "rejected"),
    CHAT: ("messages",),
    SHAREGPT: ("conversations",),
    INSTRUCTION: ("instruction", "output"),
    INFILL: ("prefix", "middle", "suffix"),
    COMPLETION: ("prompt", "completion"),
    PAPER: ("title", "abstract", "sections"),
    TEXT: ("text",),
}
# A form by the fields that common files use for it: canonical field -> the file's own.
# Taken only where no form is there by its own names.
ALIASES: tuple[tuple[Form, Mapping[str, str]], ...] = (
    (CHAT, {"messages": "conversations"}),
    (CHAT, {"messages": "conversation"}),
    (SHAREGPT, {"conversations": "conversation"}),
    (SHAREGPT, {"conversations": "messages"}),
    (INSTRUCTION, {"instruction": "instruction", "output": "response", "input": "context"}),
    (INFILL, {"prefix": "fim_prefix", "middle": "fim_middle", "suffix": "fim_suffix"}),
    (COMPLETION, {"prompt": "prompt", "completion": "response"}),
    (COMPLETION, {"prompt": "prompt", "completion": "answer"}),
    (COMPLETION, {"prompt": "prompt", "completion": "output"}),
    (COMPLETION, {"prompt": "question", "completion": "answer"}),
    (COMPLETION, {"prompt": "question", "completion": "response"}),
    (COMPLETION, {"prompt": "query", "completion": "response"}),
    (COMPLETION, {"prompt": "query", "completion": "answer"}),
    (COMPLETION, {"prompt": "problem", "completion": "solution"}),
    (COMPLETION, {"prompt": "input", "completion": "output"}),
    (TEXT, {"text": "content"}),
    (TEXT, {"text": "code"}),
)
NAMES: Mapping[Form, str] = {
    datasets_pb2.ROW_FORMAT_UNSPECIFIED: "canonical",
    CHAT: "chat",
    INSTRUCTION: "instruction",
    COMPLETION: "completion",
    TEXT: "text",
    SHAREGPT: "sharegpt",
    PREFERENCE: "preference",
    INFILL: "infill",
    CANONICAL: "canonical",
    PAPER: "paper",
}

# Where rows keep fields of a message, part, call or tool that the contract does
# not know: in the metadata, under the place they came from.
NESTED = re.compile(
    r"(messages|prompt|chosen|rejected|tools)\[(\d{1,6})\](?:\.(tool_calls|content)\[(\d{1,6})\])?\.(function/)?(.+)",
    re.DOTALL,
)
# Speakers in ShareGPT rows whose name tells more than a role; kept, under "from" of their turn.
MODELS = frozenset({"bing", "bard"})


def is_messages(text: str) -> bool:
    """Whether a text is a list of messages, as CSV fields hold it, and so cannot stand where both may."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return False
    try:
        found = json.loads(stripped)
    except (ValueError, RecursionError):
        return False
    return bool(found) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found)
