"""Which reader reads a file that is named like a document: its content decides.

Law of this room: pure. What has the name of a document and is none is refused
by what it is.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from services.datasets.documents import kind_of
from services.datasets.worker.documents import bounds, html, markdown, plain_text
from services.datasets.worker.documents.blocks import Document
from services.datasets.worker.found import INFO, Problem, Unreadable, clip

_HINT = "send Markdown, plain text, HTML, PDF or DOCX"
_OTHERS = (
    (b"{\\rtf", "an RTF document", "save it as DOCX"),
    (b"\x89PNG", "a picture", _HINT),
    (b"\xff\xd8\xff", "a picture", _HINT),
    (b"GIF8", "a picture", _HINT),
    (b"\x1f\x8b", "packed with gzip", "unpack it; documents are read as they are"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it; documents are read as they are"),
    (b"%!PS", "PostScript", "print it to PDF"),
    (b"PAR1", "Parquet", "give it the suffix .parquet"),
    (b"SQLite format 3", "a SQLite database", _HINT),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_HTML = re.compile(rb"<(?:!doctype\s+html|html)[\s>]", re.I)


def settle(data: bytes, filename: str) -> tuple[str, list[Problem]]:
    """The kind of a document, and what is worth saying of its name. Unreadable where it is none."""
    named = kind_of(filename)
    if not data.strip():
        raise Unreadable(Problem("empty_file", "the document is empty", "send a document with text"))
    if data.startswith(_OLE):
        raise Unreadable(_old_office(data))
    for magic, what, hint in _OTHERS:
        if data.startswith(magic):
            raise Unreadable(Problem("not_text", f"{clip(filename)} is {what}", hint))
    found = _by_content(data, named)
    if found == named:
        return found, []
    told = f"the name {clip(filename)} says {named}, but the content is {found}"
    return found, [Problem("wrong_suffix", told, "it was read as what it is", "", INFO)]


def _by_content(data: bytes, named: str) -> str:
    if b"%PDF-" in data[:1024]:
        return "pdf"
    if data.startswith(b"PK\x03\x04"):
        return "docx"
    if named in ("pdf", "docx"):
        told = f"it has the name of a {named.upper()} file, and its first bytes are not those of one"
        raise Unreadable(Problem("not_text", told, "send the file whole, or name it as what it is"))
    return "html" if _HTML.match(_behind_comments(data[:4096])) else named


def _behind_comments(head: bytes) -> bytes:
    """What a page begins with: behind a mark, a declaration of XML and comments, as many as there are."""
    rest = head.removeprefix(codecs.BOM_UTF8).lstrip()
    while rest.startswith((b"<!--", b"<?xml")):
        rest = rest.partition(b"-->" if rest.startswith(b"<!--") else b">")[2].lstrip()
    return rest


def _old_office(data: bytes) -> Problem:
    if "EncryptedPackage".encode("utf-16-le") in data:
        hint = "open it with its password and save it without one"
        return Problem("encrypted", "the document is encrypted with a password", hint)
    return Problem("not_text", "the file is an Office document as of before 2007", "save it as DOCX")


def reader(kind: str) -> Callable[[bytes], Document]:
    """The reader of a kind. Imported by who reads: a PDF's costs memory that others need not pay."""
    if kind == "pdf":
        from services.datasets.worker.documents import pdf

        return pdf.read
    if kind == "docx":
        from services.datasets.worker.documents import docx

        return docx.read
    return {"markdown": markdown.read, "text": plain_text.read, "html": html.read}[kind]


def read(data: bytes, filename: str) -> Document:
    """The document that a file is. Unreadable, by name, if it is none or beyond a bound."""
    if len(data) > bounds.MAX_BYTES:
        raise bounds.too_large(f"{len(data)} bytes", f"at most {bounds.MAX_BYTES} bytes")
    kind, said = settle(data, filename)
    document = reader(kind)(data)
    if not any(block.text for block in document.blocks):
        raise Unreadable(Problem("empty_file", "the document holds no text", "send a document with text"))
    if said:
        document = Document(kind, document.blocks, document.title, [*((0, p) for p in said), *document.said])
    return document
