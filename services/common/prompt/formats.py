"""The prompt formats that come with qlorad: Jinja templates beside this file.

Law of this room: a format is its text; its digest names it in ledgers and
adapters, so a changed text is another format to whoever was trained with it.
What a format cannot express it refuses, naming the field; nothing is left out.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import TypeAlias

from qlorad.v1 import messages_pb2
from services.common.errors import rejected

Format: TypeAlias = messages_pb2.PromptFormat.ValueType

OWN: Format = messages_pb2.PROMPT_FORMAT_UNSPECIFIED
"""The model's own chat template."""
FILES: Mapping[Format, str] = {
    messages_pb2.PROMPT_FORMAT_CHATML: "chatml",
    messages_pb2.PROMPT_FORMAT_ALPACA: "alpaca",
    messages_pb2.PROMPT_FORMAT_LLAMA2: "llama2",
    messages_pb2.PROMPT_FORMAT_MISTRAL: "mistral",
    messages_pb2.PROMPT_FORMAT_PHI2: "phi2",
    messages_pb2.PROMPT_FORMAT_PHI3: "phi3",
    messages_pb2.PROMPT_FORMAT_VICUNA: "vicuna",
    messages_pb2.PROMPT_FORMAT_PLAIN: "plain",
}
_ENDS: Mapping[Format, str] = {
    messages_pb2.PROMPT_FORMAT_CHATML: "<|im_end|>",
    messages_pb2.PROMPT_FORMAT_PHI3: "<|end|>",
}


def source(prompt_format: Format) -> str:
    """The template of a format; OWN has none here."""
    path = pathlib.Path(__file__).parent / "formats" / f"{FILES[prompt_format]}.jinja"
    return path.read_text(encoding="utf-8")


def template_digest(prompt_format: Format, own: str) -> str:
    """The digest of the template in use: `own`, the model's, where no format was chosen."""
    if prompt_format == OWN:
        return own
    return "sha256:" + hashlib.sha256(source(prompt_format).encode()).hexdigest()


def end_text(prompt_format: Format) -> str:
    """The text that ends an answer where it is not the model's end token; empty else.

    A model that has no such token spells it, so whoever generates must stop at it.
    """
    return _ENDS.get(prompt_format, "")


def by_name(name: str) -> Format:
    """The format that facts of a manifest name; REJECTED if this version does not know it."""
    try:
        return messages_pb2.PromptFormat.Value(name)
    except ValueError:
        known = ", ".join(messages_pb2.PromptFormat.keys())
        raise rejected("prompt_format", f"got {name!r}; this version knows {known}") from None


def name_of(prompt_format: Format) -> str:
    """As facts of a manifest name it."""
    return messages_pb2.PromptFormat.Name(prompt_format)
