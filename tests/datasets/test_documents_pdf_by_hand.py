"""The traits of PDFs once more, on files that are set by hand as other programs than reportlab do."""

from __future__ import annotations

import zlib

import pypdfium2
import pytest

from services.datasets.worker.documents.blocks import HEADING, PROSE
from services.datasets.worker.found import WARNING
from tests.datasets.pdf_kit import TALE, kept, prose, read, refused
from tests.datasets.typeset import by_hand, column, cut, letter_by_letter, shown

OTHER = TALE.replace("station", "observatory").replace("river", "estuary")


def test_two_columns_of_words_that_no_blank_parts_and_hyphens_cut() -> None:
    text = " ".join(f"{OTHER} In year {n} it was the same." for n in range(1900, 1912))
    lines = cut(text, 44)
    assert sum(line.endswith("-") for line in lines) > 5
    half = len(lines) // 2
    page = shown("A year on the hill", 72, 790, 17, "F2")
    page += column(lines[:half], 72, 750) + column(lines[half:], 320, 750)
    blocks = kept(by_hand(page))
    assert [(b.kind, b.text) for b in blocks] == [(HEADING, "A year on the hill"), (PROSE, text)]


def test_letters_that_have_a_place_each_are_words() -> None:
    lines = cut(TALE, 60)
    data = by_hand(b"".join(letter_by_letter(line, 72, 700 - 13 * n) for n, line in enumerate(lines)))
    assert prose(data) == TALE


def test_heads_that_change_sides_and_roman_numbers() -> None:
    pages = []
    for n in range(8):
        x, number = (72, 500) if n % 2 else (400, 72)
        page = shown("Field methods" if n % 2 else "The gauge", x, 805, 9) + shown(
            ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")[n], number, 30, 9
        )
        pages.append(page + column(cut(f"This is leaf {n}. {TALE}", 80), 72, 720))
    found = read(by_hand(*pages))
    left = [b.text for b in found.blocks if b.left]
    assert len(left) == 16 and {b.left for b in found.blocks if b.left} == {"page_furniture"}
    assert prose(by_hand(*pages)) == " ".join(f"This is leaf {n}. {TALE}" for n in range(8))


@pytest.mark.parametrize(
    "told",
    [
        {"to_unicode": b"1 beginbfrange <20> <7E> <0020> endbfrange 1 beginbfchar <01> <00660069> endbfchar"},
        {"to_unicode": b"1 beginbfrange <20> <7E> <0020> endbfrange 1 beginbfchar <01> <FB01> endbfchar"},
        {"differences": b"1 /fi"},
    ],
    ids=["two letters", "one sign", "by its name"],
)
def test_ligatures_however_a_font_tells_them(told: dict[str, bytes]) -> None:
    assert prose(by_hand(shown("The \x01rst gauge is \x01ne, of \x01nest make.", 72, 700), **told)) == (
        "The first gauge is fine, of finest make."
    )


def test_signs_that_tell_no_letter_are_counted_where_the_rest_is_read() -> None:
    told = b"1 beginbfrange <20> <7E> <0020> endbfrange 1 beginbfchar <01> <E001> endbfchar"
    data = by_hand(column(cut(f"Nobody reads \x01 there. {TALE}", 70), 72, 700), to_unicode=told)
    assert prose(data) == f"Nobody reads \ufffd there. {TALE}"
    ((page, problem),) = read(data).said
    assert (page, problem.rule, problem.severity) == (
        1,
        "unmapped_text",
        WARNING,
    ) and "tell no letter (1)" in problem.message


def test_a_scan_with_text_behind_it_is_read() -> None:
    image = b"q 595 0 0 842 0 0 cm BI /W 1 /H 1 /CS /G /BPC 8 ID \x99 EI Q\n"
    hidden = image + b"BT 3 Tr ET\n" + column(cut(TALE, 70), 72, 700)
    assert prose(by_hand(hidden)) == TALE and not read(by_hand(hidden)).said


def test_who_must_be_somebody_to_read_it_is_told_so() -> None:
    for told in (
        b"/Encrypt<</Filter/Adobe.PubSec/V 4/SubFilter/adbe.pkcs7.s5>>",
        b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O(%s)/U(%s)>>" % (b"o" * 32, b"u" * 32),
    ):
        data = by_hand(shown(TALE, 72, 700), more=told + b"/ID[<00><00>]")
        assert refused(data).problem.rule == "encrypted"


def test_a_file_that_was_cut_anywhere_is_never_taken_for_the_whole() -> None:
    whole = by_hand(*(column(cut(f"{TALE} Leaf {n}.", 80), 72, 760) for n in range(12)))
    assert len(pypdfium2.PdfDocument(whole)) == 12
    for at in range(1000, len(whole) - 40, len(whole) // 25):
        assert refused(whole[:at]).problem.rule == "truncated_document"
    grown = whole + b"1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n" + b"% " + b"x" * 9000
    assert refused(grown).problem.rule == "truncated_document"  # what was added to it was cut


def test_a_letter_that_is_larger_than_its_text_is_no_heading() -> None:
    lines = cut(TALE, 70)
    page = (
        shown("T", 72, 690, 34)
        + shown(lines[0][1:], 92, 700)
        + column(lines[1:2], 92, 688)
        + column(lines[2:], 72, 676)
    )
    assert [(b.kind, b.text) for b in kept(by_hand(page))] == [(PROSE, TALE)]


def test_the_same_bytes_are_the_same_blocks() -> None:
    data = by_hand(column(cut(f"{TALE} {OTHER}", 50), 72, 760), zlib.decompress(zlib.compress(shown(TALE, 72, 700))))
    assert read(data).blocks == read(data).blocks


def test_letters_beyond_the_first_plane_are_letters() -> None:
    told = b"1 beginbfrange <20> <7E> <0020> endbfrange "
    told += b"3 beginbfchar <01> <D83CDF27> <02> <D835DD1E> <03> <D83C> endbfchar"
    data = by_hand(column(cut(f"Rain \x01 and \x02\x02, half a \x03 too. {TALE}", 70), 72, 700), to_unicode=told)
    (block,) = kept(data)
    assert block.text == f"Rain 🌧 and 𝔞𝔞, half a \ufffd too. {TALE}"
    text = pypdfium2.PdfDocument(data)[0].get_textpage()
    assert "🌧 and 𝔞𝔞" in text.get_text_range(block.span.begin, block.span.end - block.span.begin)


def test_a_script_from_right_to_left_is_told() -> None:
    told = b"1 beginbfrange <20> <7E> <05D0> endbfrange"
    data = by_hand(column(cut(TALE, 70), 72, 700), to_unicode=told)
    assert [(page, p.rule) for page, p in read(data).said] == [(1, "right_to_left")]
