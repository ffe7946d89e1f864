"""The kinds of documents: their names and suffixes.

Law of this room: words only. How a document is read stands under worker/documents.
"""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "markdown": (".md", ".markdown"),
    "text": (".txt", ".text"),
    "html": (".html", ".htm", ".xhtml"),
    "pdf": (".pdf",),
    "docx": (".docx",),
}
SUFFIXES = tuple(suffix for suffixes in KINDS.values() for suffix in suffixes)


def kind_of(filename: str) -> str:
    """The kind of a document by its name; "" if it is none."""
    name = filename.lower()
    return next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), "")
