"""What a page is, by what its server says, and what its file is called.

Law of this room: pure. The type decides; the name of the page only among what
the type leaves open, or where the server says no more than "bytes". A file's
name ends in what its readers know it by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from services.datasets.web_rules import Page

_DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_HTML = (".html", ".htm", ".xhtml")
_MARKDOWN = (".md", ".markdown")
_LINES = (".jsonl", ".ndjson")
# What a type may be called; the first is added where the page's name is none of them.
_TYPES: Mapping[str, tuple[str, ...]] = {
    "text/html": _HTML,
    "application/xhtml+xml": _HTML,
    "text/plain": (".txt", ".text", *_MARKDOWN, *_LINES, ".json", ".csv", ".tsv"),
    "text/markdown": _MARKDOWN,
    "text/x-markdown": _MARKDOWN,
    "application/pdf": (".pdf",),
    _DOCX: (".docx",),
    "application/json": (".json", *_LINES),
    "application/x-ndjson": _LINES,
    "application/jsonl": _LINES,
    "application/jsonlines": _LINES,
    "application/x-jsonlines": _LINES,
    "text/csv": (".csv",),
    "text/tab-separated-values": (".tsv",),
}
_UNTOLD = ("", "application/octet-stream", "binary/octet-stream")
_BINARY = (".pdf", ".docx")
_KNOWN = tuple(dict.fromkeys(suffix for suffixes in _TYPES.values() for suffix in suffixes))
ACCEPT = "text/html, text/markdown;q=0.9, text/plain;q=0.9, */*;q=0.5"
ACCEPTED = (
    "text/html, text/plain, text/markdown, application/pdf, DOCX, JSON, JSON Lines, CSV or TSV; "
    f"or bytes of a page whose name ends in {', '.join(_KNOWN)}"
)
_ODD = re.compile(r"[\x00-\x1f\x7f/\\:]+")


@dataclass(frozen=True, slots=True)
class Kind:
    """What readers a page is for."""

    suffixes: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        return self.suffixes[0] not in _BINARY

    @property
    def is_html(self) -> bool:
        return self.suffixes is _HTML


def kind_of(content_type: str, page: Page) -> Kind | None:
    """The kind of a page; None for one that is not read."""
    told = content_type.partition(";")[0].strip().lower()
    if told in _TYPES:
        return Kind(_TYPES[told])
    if told in _UNTOLD:
        suffix = next((s for s in _KNOWN if page.path.lower().endswith(s)), "")
        return Kind(_HTML if suffix in _HTML else (suffix,)) if suffix else None
    return None


@dataclass(slots=True)
class Names:
    """Names of files, each given once."""

    _given: set[str] = field(default_factory=set)

    def of(self, page: Page, kind: Kind) -> str:
        """Host and path as a file's name: never one that leads anywhere, and with an end that tells the kind."""
        parts = [_ODD.sub("-", unquote(part)) for part in page.path.split("/")]
        parts = ["".join(c for c in p if c.isprintable())[:100] for p in parts if p.strip(".- ")]
        if page.path.endswith("/") or not parts:
            parts.append("index")
        name = "/".join([page.place.host.replace(":", "-"), *parts])[-200:].lstrip("/")
        suffix = next((s for s in kind.suffixes if name.lower().endswith(s)), "")
        stem, suffix = (name[: -len(suffix)], name[-len(suffix) :]) if suffix else (name, kind.suffixes[0])
        name, number = stem + suffix, 1
        while name in self._given:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._given.add(name)
        return name
