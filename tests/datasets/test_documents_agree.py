"""One methodology as Markdown, PDF and DOCX: the same items, and each stands where its span says."""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass

import docx
import pypdfium2
import pytest

from services.datasets.worker.documents import kinds
from services.datasets.worker.documents.analyse import Found, Item, analyse
from services.datasets.worker.documents.blocks import Document, Span
from tests.datasets.setting import as_docx, as_pdf
from tests.house import ROOT

TEXT = (ROOT / "examples" / "documents" / "methodology.md").read_text()
NAMES = ("a.md", "a.pdf", "a.docx")
LEAST_ITEMS = 30
LEAST_SHARE = 0.8


@dataclass(frozen=True)
class Set:
    """The text as one kind of file, and what was found in it."""

    data: bytes
    document: Document
    found: Found


@functools.cache
def of(name: str) -> Set:
    data = {
        "a.md": TEXT.encode,
        "a.pdf": lambda: as_pdf(TEXT, size=13.5, leading=2.1, margin_cm=3.6),
        "a.docx": lambda: as_docx(TEXT),
    }[name]()
    document = kinds.read(data, name)
    return Set(data, document, analyse(document, "en"))


def said(item: Item) -> tuple[str, str, str]:
    """An item without what only one of the kinds can tell: the language of code, marks of code in prose, line ends."""
    answer = re.sub(r"^```\w*$", "```", item.answer, flags=re.M).replace("`", "")
    return item.rule, item.question.replace("`", ""), " ".join(answer.split())


def test_the_pdf_has_forty_pages() -> None:
    assert 38 <= len(pypdfium2.PdfDocument(of("a.pdf").data)) <= 46


def test_each_kind_gives_items_and_most_of_them_are_the_same() -> None:
    items = {name: {said(item) for item in of(name).found.items} for name in NAMES}
    for name in NAMES:
        assert len(items[name]) == len(of(name).found.items) >= LEAST_ITEMS
        assert {rule for rule, _, _ in items[name]} == {
            "heading", "definition", "procedure", "question", "principle", "code", "table",
        }  # fmt: skip
    common = items["a.md"] & items["a.pdf"] & items["a.docx"]
    for name in NAMES:
        assert len(common) >= LEAST_SHARE * len(items[name]), items[name] - common


@pytest.mark.parametrize("name", NAMES)
def test_each_item_stands_where_its_spans_say(name: str) -> None:
    text = {"a.md": lines_of, "a.pdf": pages_of, "a.docx": paragraphs_of}[name](of(name).data)
    for item in of(name).found.items:
        there = words("\n".join(text(span) for span in item.spans))
        answer = words(item.answer)
        assert answer and (there == answer or contains(answer, there)), (item.question, answer[:200], there[:200])
        # Nothing else stands there but marks of lists and tables, and what a page has at its edges.
        assert len(there) <= 1.1 * len(answer) + 60, (item.question, there)


def lines_of(data: bytes):  # type: ignore[no-untyped-def]
    lines = data.decode().split("\n")

    def at(span: Span) -> str:
        whole = "\n".join(lines[span.first - 1 : span.last])
        assert data.decode()[span.begin : span.end] == whole
        return re.sub(r"^```\w*$", "", whole, flags=re.M)

    return at


def pages_of(data: bytes):  # type: ignore[no-untyped-def]
    document = pypdfium2.PdfDocument(data)

    def at(span: Span) -> str:
        found = ""
        for number in range(span.first, span.last + 1):
            page = document[number - 1].get_textpage()
            begin = span.begin if number == span.first else 0
            end = span.end if number == span.last else page.count_chars()
            found += page.get_text_range(begin, end - begin) + "\n"
        return found

    return at


def paragraphs_of(data: bytes):  # type: ignore[no-untyped-def]
    body = docx.Document(io.BytesIO(data)).element.body
    found = [
        "".join(t.text or "" for t in p.iter() if t.tag.endswith("}t")) for p in body.iter() if p.tag.endswith("}p")
    ]
    return lambda span: "\n".join(found[span.first - 1 : span.last])


def words(text: str) -> str:
    """Letters alone, without the numbers of lists, which DOCX does not write, and the language of code."""
    text = re.sub(r"^```\w*$", "", text, flags=re.M)
    return re.sub(r"[\W\d_]", "", text).lower()


def contains(answer: str, there: str) -> bool:
    """Whether an answer is there, but for what a page has between: a running head."""
    return answer in there or answer in there.replace("fieldmethods", "")
