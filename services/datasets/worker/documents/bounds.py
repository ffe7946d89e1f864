"""How much of a document is read, and the problems of what is beyond that.

Law of this room: pure. Each bound is far above what people write, and below
what a worker may take.
"""

from __future__ import annotations

import codecs

from services.datasets.worker.found import Problem, Unreadable

MAX_BYTES = 64 << 20
MAX_PAGES = 3000
MAX_BLOCKS = 200_000
MAX_CHARACTERS = 32 << 20
MAX_NESTING = 100
MAX_PARTS = 10_000
"""Files in a DOCX."""
MAX_PART_BYTES = 64 << 20
MAX_RATIO = 400
"""Unpacked bytes of a part for each packed one."""

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 120


def too_large(given: str, accepted: str) -> Unreadable:
    """The refusal of a document that is beyond a bound."""
    return Unreadable(Problem("document_too_large", f"the document has {given}", f"{accepted}; or cut it in parts"))


def too_deep(limit: int = MAX_NESTING) -> Unreadable:
    """The refusal of a document whose parts lie too deep in one another."""
    told = f"lists, quotes or elements lie more than {limit} deep in one another"
    return Unreadable(Problem("too_deep", told, "flatten it"))


def checked(blocks: int, characters: int) -> None:
    """Unreadable where a document has more of it than is read."""
    if blocks > MAX_BLOCKS:
        raise too_large(f"more than {MAX_BLOCKS} blocks", f"at most {MAX_BLOCKS}")
    if characters > MAX_CHARACTERS:
        raise too_large(f"more than {MAX_CHARACTERS} characters", f"at most {MAX_CHARACTERS}")


def text_of(data: bytes, encoding: str = "") -> str:
    """A file's text: by its mark, as UTF-8, or in the encoding that it names. Unreadable in none of them."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif not encoding or data.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        told = f"byte 0x{data[e.start]:02x} at {e.start} is not {encoding.removesuffix('-sig').upper()}"
        raise Unreadable(Problem("not_utf8", told, "save the file as UTF-8"), line) from None
    if "\0" in text:
        told = "the file holds U+0000, as no text does"
        raise Unreadable(Problem("not_text", told, "send Markdown, plain text, HTML, PDF or DOCX"))
    checked(0, len(text))
    return text


def out_of_memory(bound: int) -> Problem:
    """The problem of a document that needs too much of it."""
    told = f"reading it takes more than the {bound} bytes of memory that a document may take"
    return Problem("document_too_large", told, "cut it in parts")


def broken(why: str) -> Problem:
    """The problem of a document that nobody can read."""
    told = f"the document is damaged: {why}"
    return Problem("broken_document", told, "open it with a program that shows it, and save it anew")
