"""From a conversation to the text that a model reads.

Law of this room: the same text in training and in serving, and the same as
transformers' apply_chat_template, byte for byte. The date is the manifest's,
never the clock's. Where a prompt format was chosen, its template stands in the
place of the model's own; special tokens are the model's in either case.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from qlorad.v1 import messages_pb2
from services.common import artifacts
from services.common.errors import rejected, show
from services.common.prompt import formats
from services.common.prompt.sandbox import Template

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(eq=False)
class RenderError(Exception):
    """The template did not render: it refused the conversation, or failed on it.

    Not frozen: Python itself sets the traceback on an exception.
    """

    message: str
    refused: bool = False
    """The template's own raise_exception, so the message is for people."""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation."""

    text: str
    spans: tuple[tuple[int, int], ...] | None
    """Characters that the assistant generates, from marks; None if the marks cannot tell."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """The chat template of one model. Safe to share between threads.

    Reads its files once, when opened. Does not tokenise.
    """

    templates: Mapping[str, Template]
    special_tokens: Mapping[str, str]
    tokenizer_digest: str
    """sha256 of tokenizer.json, "sha256:…"."""
    template_digest: str
    """sha256 of the text of the template in use, "sha256:…"; empty if there is none."""
    digest: str
    """Names everything a rendering depends on: tokenizer, templates, special tokens, date."""
    prompt_format: formats.Format = formats.OWN
    """Which template is in use."""

    @classmethod
    def open(cls, payload: pathlib.Path, date: str, prompt_format: formats.Format = formats.OWN) -> Renderer:
        """The renderer of a model folder; `date` is ISO, as in ModelFacts.template_date.

        REJECTED naming the file where one is missing, or is not what it should be.
        """
        if not (payload / TOKENIZER).is_file():
            raise rejected(TOKENIZER, "is missing; a fast tokenizer's file is needed")
        try:
            today = datetime.date.fromisoformat(date)
        except ValueError:
            raise rejected("template_date", f"got {show(date)}; accepted: a date as 2026-01-31") from None
        config = read_config(payload)
        own = prompt_format == formats.OWN
        sources = _template_sources(payload, config) if own else {"default": formats.source(prompt_format)}
        tokens = special_tokens(payload, config)
        tokenizer_digest = "sha256:" + artifacts.sha256_file(payload / TOKENIZER)
        everything = [tokenizer_digest, sources, tokens, today.isoformat()]
        return cls(
            templates={name: _compile(name, source, today) for name, source in sources.items()},
            special_tokens=tokens,
            tokenizer_digest=tokenizer_digest,
            template_digest=_template_digest(sources),
            digest=_sha256(json.dumps(everything, sort_keys=True)),
            prompt_format=prompt_format,
        )

    @property
    def sees_parts(self) -> bool:
        """Whether the template tells a message's parts apart: Alpaca does, instruction from input."""
        return self.prompt_format == messages_pb2.PROMPT_FORMAT_ALPACA

    @property
    def has_template(self) -> bool:
        return "default" in self.templates

    @property
    def has_generation_marks(self) -> bool:
        return self.has_template and self.templates["default"].has_generation_marks

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The conversation as the model reads it.

        Takes what example.as_template_sees gives. RenderError where the
        template refuses the conversation or fails on it, or there is none.
        """
        if not self.has_template:
            raise RenderError("the model has no chat template; only prompts and completions can be used with it")
        for_tools = tools is not None and "tool_use" in self.templates
        template = self.templates["tool_use" if for_tools else "default"]
        variables: dict[str, Any] = {
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }
        try:
            return Rendered(*template.render(variables))
        except MemoryError:
            raise
        except jinja2.TemplateError as e:
            own_words = type(e) is jinja2.TemplateError
            raise RenderError(e.message or type(e).__name__, refused=own_words) from e
        except Exception as e:  # whatever a stranger's template divides, slices or calls wrongly
            raise RenderError(f"{type(e).__name__}: {e}") from e


def read_config(payload: pathlib.Path) -> Mapping[str, Any]:
    """tokenizer_config.json as a mapping; empty if there is none."""
    return _read_json(payload / TOKENIZER_CONFIG)


def special_tokens(payload: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that templates use, as in eos_token."""
    told = dict(config)
    if "added_tokens_decoder" not in config:  # folders older than that field kept them beside
        told.update(_read_json(payload / _SPECIAL_TOKENS_MAP))
    extra = told.get("extra_special_tokens")
    named = {k: v for k, v in told.items() if k in _STANDARD or k.endswith("_token")}
    if isinstance(extra, dict):
        named.update(extra)
    found = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {k: v for k, v in found.items() if isinstance(v, str)}


def _template_sources(payload: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    if (payload / TEMPLATE).is_file():
        try:
            return {"default": (payload / TEMPLATE).read_text(encoding="utf-8")}
        except UnicodeDecodeError as e:
            raise rejected(TEMPLATE, f"is not UTF-8: {e}") from None
    told = config.get("chat_template")
    if told is None:
        return {}
    if isinstance(told, str):
        return {"default": told}
    pairs = [(t.get("name"), t.get("template")) for t in told if isinstance(t, dict)] if isinstance(told, list) else []
    named = {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}
    if "default" not in named:
        raise rejected(TOKENIZER_CONFIG, f"chat_template names {sorted(named)}; one of them must be 'default'")
    return named


def _template_digest(sources: Mapping[str, str]) -> str:
    if not sources:
        return ""
    if list(sources) == ["default"]:
        return _sha256(sources["default"])
    return _sha256(json.dumps(sources, sort_keys=True))


def _compile(name: str, source: str, today: datetime.date) -> Template:
    try:
        return Template.compile(source, today)
    except jinja2.TemplateSyntaxError as e:
        raise rejected(TEMPLATE, f"template {name!r}, line {e.lineno}: {e.message}") from None


def _read_json(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise rejected(path.name, f"is not JSON: {e}") from None
    if not isinstance(told, dict):
        raise rejected(path.name, f"holds a {type(told).__name__}; accepted: a JSON object")
    return told


def _sha256(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
