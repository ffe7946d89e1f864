"""Every trait of PDFs that hurts: handled, or refused by name. Each test sets its own PDF."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pypdfium2
import pytest

from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, PROSE, TABLE, Block
from services.datasets.worker.found import WARNING, Unreadable
from tests.datasets.pdf_kit import TALE, kept, prose, read, refused
from tests.datasets.setting import as_pdf

Draw = Callable[[Any], None]


def drawn(*pages: Draw, font: tuple[str, float] = ("Times-Roman", 11), **more: Any) -> bytes:
    """A PDF of A4 pages that are drawn by hand."""
    from reportlab.pdfgen.canvas import Canvas

    out = io.BytesIO()
    canvas = Canvas(out, pagesize=(595, 842), invariant=1, **more)
    for page in pages:
        canvas.setFont(*font)
        page(canvas)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def lines(texts: Sequence[str], x: float = 72, y: float = 700, leading: float = 14) -> Draw:
    def draw(canvas: Any) -> None:
        for n, text in enumerate(texts):
            canvas.drawString(x, y - n * leading, text)

    return draw


def there(data: bytes, block: Block) -> str:
    """What the file has at a block's span, by PDFium alone."""
    document, span = pypdfium2.PdfDocument(data), block.span
    found = ""
    for number in range(span.first, span.last + 1):
        text = document[number - 1].get_textpage()
        begin = span.begin if number == span.first else 0
        end = span.end if number == span.last else text.count_chars()
        found += text.get_text_range(begin, end - begin) + "\n"
    return found


def squeezed(text: str) -> str:
    return re.sub(r"[^\w]", "", text).lower()


def wrapped(words: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(words, width, break_long_words=False)


LEFT = wrapped(TALE.replace("station", "first station") * 3, 42)
RIGHT = wrapped(TALE.replace("station", "second station") * 3, 42)


@pytest.mark.parametrize("by_row", [False, True], ids=["column by column", "row by row"])
def test_two_columns_are_read_one_after_the_other(by_row: bool) -> None:
    def page(canvas: Any) -> None:
        canvas.setFont("Times-Bold", 18)
        canvas.drawString(72, 760, "A title that goes over both of the columns")
        canvas.setFont("Times-Roman", 10)
        sides = [(72.0, LEFT), (315.0, RIGHT)]
        placed = [(x, n, text) for x, side in sides for n, text in enumerate(side)]
        for x, n, text in sorted(placed, key=lambda p: (p[1], p[0])) if by_row else placed:
            canvas.drawString(x, 720 - 13 * n, text)

    data = drawn(page)
    heading, *rest = kept(data)
    assert heading.kind == HEADING and heading.text == "A title that goes over both of the columns"
    assert " ".join(b.text for b in rest) == " ".join(LEFT + RIGHT)


def test_a_text_in_two_columns_is_the_text_in_one() -> None:
    text = f"# Notes\n\n{TALE}\n\n## Gauge\n\n{TALE * 2}\n\n1. Rinse the probe.\n2. Dry it well.\n"
    text += f"\n## Log\n\n{TALE * 4}\n"
    told = [[(b.kind, b.text) for b in kept(as_pdf(text, head="", columns=n, size=9.5))] for n in (1, 2)]
    assert told[0] == told[1] and len(told[0]) == 8


def test_words_cut_by_a_hyphen_are_whole_again() -> None:
    data = drawn(
        lines(["The instru-", "ment shows a well-", "known value. What is well-known is sel-", "dom measured."])
    )
    assert prose(data) == "The instrument shows a well-known value. What is well-known is seldom measured."
    assert there(data, kept(data)[0]).strip().startswith("The instru")


def test_heads_feet_and_numbers_of_pages_are_left_out() -> None:
    def page(n: int) -> Draw:
        def draw(canvas: Any) -> None:
            canvas.drawString(
                72, 800, "Field methods" if n % 2 else "Chapter " + "one two three four five six".split()[n // 2]
            )
            canvas.drawString(290, 40, str(n + 7))
            lines(wrapped(TALE + f" This is page {n}.", 80))(canvas)

        return draw

    data = drawn(*(page(n) for n in range(9)))
    found = read(data)
    assert [b.text for b in found.blocks if not b.left and "Field" in b.text] == []
    left = [b.text for b in found.blocks if b.left == "page_furniture"]
    assert len(left) == 18 and "15" in left and "Field methods" in left and "Chapter three" in left
    assert prose(data).count("The station stands") == 9


def test_a_paragraph_goes_on_over_a_page_and_its_foot() -> None:
    def page(texts: Sequence[str], number: int) -> Draw:
        def draw(canvas: Any) -> None:
            canvas.drawString(290, 40, f"– {number} –")
            lines(texts)(canvas)

        return draw

    text = wrapped(TALE * 4, 80)
    data = drawn(page(text[:7], 1), page(text[7:], 2))
    (block,) = kept(data)
    assert block.text == " ".join(text) and (block.span.first, block.span.last) == (1, 2)
    assert squeezed(there(data, block)).startswith(squeezed(" ".join(text[:7])))


def test_ligatures_are_letters() -> None:
    import os

    import reportlab
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    pdfmetrics.registerFont(TTFont("Vera", os.path.join(os.path.dirname(reportlab.__file__), "fonts", "Vera.ttf")))
    data = drawn(lines(["The \ufb01rst \ufb02ow was measured at the \ufb01lter."]), font=("Vera", 11))
    assert prose(data) == "The first flow was measured at the filter."


def picture(canvas: Any) -> None:
    from PIL import Image

    canvas.drawInlineImage(Image.new("RGB", (40, 40), (200, 20, 20)), 100, 300, 300, 300)


def test_a_scanned_page_is_told_and_a_scanned_document_refused() -> None:
    found = read(drawn(lines(wrapped(TALE, 80)), picture, picture, lines(wrapped(TALE * 2, 80))))
    ((page, problem),) = found.said
    assert (page, problem.rule, problem.severity) == (2, "scanned_page", WARNING)
    assert problem.message.startswith("pages 2 to 3") and "OCR" in problem.hint
    alone = refused(drawn(picture, picture))
    assert alone.problem.rule == "scanned_page" and "OCR" in alone.problem.hint and alone.line == 1


def test_an_encrypted_pdf_is_refused_by_name() -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption

    error = refused(drawn(lines([TALE]), encrypt=StandardEncryption("secret", canPrint=0)))
    assert error.problem.rule == "encrypted" and "without" in error.problem.hint
    open_to_all = drawn(lines(wrapped(TALE, 80)), encrypt=StandardEncryption("", ownerPassword="own"))
    assert prose(open_to_all) == TALE


def test_a_pdf_that_was_cut_off_is_refused_by_name() -> None:
    whole = as_pdf(f"# Title\n\n{TALE * 40}\n")
    for share in (0.1, 0.5, 0.9):
        error = refused(whole[: int(len(whole) * share)])
        assert error.problem.rule == "truncated_document" and "cut off" in error.problem.message
    assert refused(b"%PDF-1.7\nnonsense\n%%EOF\n").problem.rule == "broken_document"


def test_a_broken_table_of_places_is_mended_or_named() -> None:
    whole = as_pdf(f"# Title\n\n{TALE}\n", head="")
    at = whole.rindex(b"startxref")
    assert prose(whole[:at] + b"startxref\n7\n%%EOF\n") == TALE


def test_letters_that_tell_nothing_are_named() -> None:
    data = drawn(lines(wrapped(TALE, 80)), lines(["\ue001\ue002\ue003 \ue004\ue005"], y=500), font=("Helvetica", 11))
    assert prose(data).startswith("The station")  # what a standard font cannot show is no letter of it
    from services.datasets.worker.documents import pdf
    from services.datasets.worker.documents.pdf_words import Look, Page, Word

    look = Look(10, False, False, False, False)
    pages = [Page(n, 595, 842, (Word("\ufffd" * 9, 0, 9, 0, look, 0, 9),), False, 9) for n in (1, 2)]
    with pytest.raises(Unreadable) as caught:
        list(pdf._judged(pages))
    assert caught.value.problem.rule == "unmapped_text" and "pages 1 to 2" in caught.value.problem.message


def test_a_turned_page_is_read_and_turned_text_on_an_upright_one_is_not() -> None:
    def turned(canvas: Any) -> None:
        lines(wrapped(TALE, 80))(canvas)
        canvas.translate(30, 200)
        canvas.rotate(90)
        canvas.drawString(0, 0, "Stamp of the library of the river people")

    assert prose(drawn(turned)) == TALE
    ((page, problem),) = read(drawn(turned)).said
    assert (page, problem.rule) == (
        1,
        "turned_text",
    ) and "set askew, as of a stamp, was not read (33 letters)" in problem.message

    def on_its_side(canvas: Any) -> None:
        canvas.setPageRotation(90)
        canvas.translate(500, 50)
        canvas.rotate(90)
        lines(wrapped(TALE, 60), x=20, y=300)(canvas)

    assert prose(drawn(on_its_side)) == TALE


def test_lists_tables_and_code_are_what_they_were() -> None:
    text = "# Guide\n\nIt needs `zero` and care:\n\n- rinse the probe\n- dry it, and wait until nothing\n\n"
    text += "1. Open the valve.\n2. Close it.\n\n| sign | meaning |\n|---|---|\n| red | stop at once |\n"
    text += "| green | go on |\n\n```python\ndef zero(probe):\n    if probe:\n        return 0\n\n    return 1\n```\n\n"
    text += "That is all there is to it.\n"
    found = kept(as_pdf(text, head=""))
    assert [b.kind for b in found] == [HEADING, PROSE, ITEM, ITEM, ITEM, ITEM, TABLE, CODE, PROSE]
    assert found[1].text == "It needs `zero` and care:"
    assert [b.number for b in found[2:6]] == [None, None, 1, 2]
    assert found[6].cells == (("sign", "meaning"), ("red", "stop at once"), ("green", "go on"))
    assert found[7].text == "def zero(probe):\n    if probe:\n        return 0\n\n    return 1"


def test_bookmarks_show_headings_that_look_like_text() -> None:
    def page(canvas: Any) -> None:
        canvas.setFont("Times-Bold", 11)
        canvas.drawString(72, 720, "Gauges, and who reads them.")
        canvas.bookmarkPage("g")
        canvas.addOutlineEntry("Gauges, and who reads them.", "g")
        canvas.setFont("Times-Roman", 11)
        lines(wrapped(TALE, 80))(canvas)

    assert kept(drawn(page))[0].kind == HEADING


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_page_that_lies_on_its_side_and_does_not_say_so_is_read(angle: int) -> None:
    def lying(canvas: Any) -> None:
        canvas.translate(*{90: (595, 0), 180: (595, 842), 270: (0, 842)}[angle])
        canvas.rotate(angle)
        lines(wrapped(TALE, 60), y=400)(canvas)

    data = drawn(lines(wrapped(TALE.replace("station", "house"), 60)), lying)
    assert prose(data) == TALE.replace("station", "house") + " " + TALE and not read(data).said
    block = kept(data)[-1]
    assert block.span.first == 2 and sorted(squeezed(there(data, block))) == sorted(squeezed(TALE))


def test_a_document_that_is_set_aslant_is_refused_by_name() -> None:
    def aslant(canvas: Any) -> None:
        canvas.rotate(30)
        lines(wrapped(TALE, 60), x=300, y=400)(canvas)

    error = refused(drawn(aslant)).problem
    assert error.rule == "turned_text" and "aslant" in error.message


def test_a_scan_below_which_its_program_wrote_its_name_is_a_scan() -> None:
    def scan(canvas: Any) -> None:
        from PIL import Image

        canvas.drawInlineImage(Image.new("L", (40, 40), 99), 0, 0, 595, 842)
        canvas.drawString(200, 20, "Scanned with an app")

    assert refused(drawn(scan, scan)).problem.rule == "scanned_page"
    ((page, problem),) = read(drawn(lines(wrapped(TALE, 80)), scan)).said
    assert (page, problem.rule) == (2, "scanned_page")


def test_words_of_every_script_are_whole_again() -> None:
    from services.datasets.worker.documents import hyphens

    assert hyphens.join("изме-", "рение", set()) == "измерение" and hyphens.join("mě-", "ření", set()) == "měření"
    assert hyphens.join("Saint-", "Malo", set()) == "Saint-Malo" and hyphens.join("2-", "fold", set()) == "2-fold"
    long = "a" * 200_000
    assert hyphens.join(f"{long} well-", "known", {"well-known"}) == f"{long} well-known"
