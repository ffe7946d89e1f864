"""PDF as blocks: what is set on pages, put back into paragraphs.

Law of this room: PDFium reads the file, in a process that may die of it. What
cannot be read is refused by name: encrypted, cut off, scanned, without letters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as raw

from services.datasets.worker.documents import bounds, pdf_blocks, pdf_furniture
from services.datasets.worker.documents.blocks import Document
from services.datasets.worker.documents.pdf_lines import all_lines
from services.datasets.worker.documents.pdf_words import Page, letters, words_of
from services.datasets.worker.found import INFO, WARNING, Problem, Unreadable

_TAIL = 4096
_MOST_BOOKMARKS = 5000
_UNMAPPED = 0.2
_OCR = "run it through text recognition (OCR) and send what comes out"


def read(data: bytes) -> Document:
    """The document that the bytes are."""
    _check_whole(data)
    opened = _open(data)
    try:
        count = len(opened)
        if count > bounds.MAX_PAGES:
            raise bounds.too_large(f"{count} pages", f"at most {bounds.MAX_PAGES} pages")
        if count == 0:
            raise Unreadable(bounds.broken("it has no pages"))
        pages, size = [], 0
        for number in range(1, count + 1):
            pages.append(_page(opened, number))
            size += letters(pages[-1].words)
            bounds.checked(0, size)
        marks = _bookmarks(opened)
    finally:
        opened.close()
    said = list(_judged(pages))
    shown = [p for p in pages if p.upright and not _is_unmapped(p)]
    lines = all_lines(shown)
    around = pdf_furniture.furniture(shown, lines)
    blocks = pdf_blocks.build(lines, around, marks)
    bounds.checked(len(blocks), 0)
    return Document("pdf", blocks, said=said)


def _check_whole(data: bytes) -> None:
    """Unreadable where the file has no end: the rest would be guessed."""
    if b"%%EOF" not in data[-_TAIL:] and b"startxref" not in data[-_TAIL:]:
        told = "the PDF has no end: it was cut off, or is still being written"
        raise Unreadable(Problem("truncated_document", told, "fetch or save it anew"))


def _open(data: bytes) -> Any:
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as e:
        if raw.FPDF_GetLastError() in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY) or "assword" in str(e):
            hint = "open it with its password and save or print it without one"
            raise Unreadable(Problem("encrypted", "the PDF is encrypted with a password", hint)) from None
        raise Unreadable(bounds.broken("no page of it can be found")) from None


def _page(opened: Any, number: int) -> Page:
    try:
        page = opened[number - 1]
    except pdfium.PdfiumError:
        raise Unreadable(bounds.broken(f"page {number} cannot be read"), number) from None
    try:
        return words_of(page.raw, number)
    finally:
        page.close()


def _bookmarks(opened: Any) -> dict[int, set[str]]:
    """Titles that the document lists of itself, by page."""
    found: dict[int, set[str]] = {}
    for n, mark in enumerate(opened.get_toc(max_depth=8)):
        if n == _MOST_BOOKMARKS:
            break
        target = mark.get_dest()
        place = target.get_index() if target is not None else None
        if place is not None:
            found.setdefault(place + 1, set()).add(pdf_blocks.plain(mark.get_title()))
    return found


def _is_unmapped(page: Page) -> bool:
    return page.unmapped > _UNMAPPED * letters(page.words)


def _from_right(page: Page) -> int:
    """Letters of a page that run from right to left."""
    return sum(unicodedata.bidirectional(c) in ("R", "AL") for word in page.words for c in word.text)


def _judged(pages: Sequence[Page]) -> Iterator[tuple[int, Problem]]:
    """What is to be said of pages that give nothing, or not all. Unreadable where none gives anything."""
    pictures = [p.number for p in pages if p.is_picture]
    unmapped = [p.number for p in pages if p.words and _is_unmapped(p)]
    turned = {p.number: letters(p.words) - letters(p.upright) for p in pages if not _is_unmapped(p)}
    if not any(p.upright and not p.is_picture and not _is_unmapped(p) for p in pages):
        if unmapped:
            told = f"the fonts of {_named(unmapped)} do not tell which letters they show"
            raise Unreadable(Problem("unmapped_text", told, _OCR), unmapped[0])
        if pictures:
            told = f"{_named(pictures)}: pictures without text, or hardly any"
            raise Unreadable(Problem("scanned_page", told, _OCR), pictures[0])
        if any(turned.values()):
            told = f"all letters are set aslant ({sum(turned.values())} of them)"
            raise Unreadable(Problem("turned_text", told, "set them upright"))
        raise Unreadable(Problem("empty_file", "the pages of the PDF are empty", "send a document with text"))
    for first, last in _stretches(pictures):
        told = f"{_named(range(first, last + 1))}: a picture without text, as of a scan"
        yield first, Problem("scanned_page", told, _OCR, "", WARNING)
    for first, last in _stretches(unmapped):
        told = f"the fonts of {_named(range(first, last + 1))} do not tell which letters they show; left out"
        yield first, Problem("unmapped_text", told, _OCR, "", WARNING)
    for page in pages:
        if page.unmapped and not _is_unmapped(page):
            told = f"page {page.number}: signs that tell no letter ({page.unmapped}); U+FFFD stands for each"
            yield page.number, Problem("unmapped_text", told, "mend these places, or leave the rows out", "", WARNING)
        if 2 * _from_right(page) > letters(page.words):
            told = f"page {page.number}: text that runs from right to left; its words may stand in the wrong order"
            yield (
                page.number,
                Problem("right_to_left", told, "look at the rows, or send it as DOCX or HTML", "", WARNING),
            )
        if count := turned.get(page.number):
            told = f"page {page.number}: text that is set askew, as of a stamp, was not read ({count} letters)"
            yield page.number, Problem("turned_text", told, "what is worth learning should stand upright", "", INFO)


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def _named(numbers: Sequence[int]) -> str:
    several = _stretches(numbers)
    told = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in several[:5])
    return f"page{'s' if len(numbers) > 1 else ''} {told}{' and more' if len(several) > 5 else ''}"
