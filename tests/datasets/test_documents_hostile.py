"""Hostile documents: each ends in a finding with a name, within bounds, and the next one is read as if nothing was."""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator

import pytest

from services.datasets.worker.documents.apart import Reader, UnreadableDocument
from tests.datasets.setting import as_docx
from tests.house import ROOT, eventually

GOOD = "# Guide\n\nThe probe is rinsed with water and dried before it is used again.\n"
MEMORY = 420 << 20


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """One process for all, with narrow bounds."""
    with Reader(memory_bytes=MEMORY, cpu_seconds=3) as one:
        yield one


def refusal(reader: Reader, folder: pathlib.Path, data: bytes, name: str) -> UnreadableDocument:
    path = folder / "document"
    path.write_bytes(data)
    with pytest.raises(UnreadableDocument) as caught:
        reader.read(path, name, False)
    path.write_text(GOOD)
    assert [r.row is not None for r in reader.read(path, "good.md", False).records] == [True]
    return caught.value


def packed(how: int = zipfile.ZIP_DEFLATED, **parts: bytes) -> bytes:
    """A zip archive of these parts."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as f:
        for name, data in parts.items():
            f.writestr({"document": "word/document.xml"}.get(name, name), data)
    return out.getvalue()


def pdf(*objects: bytes) -> bytes:
    """A PDF of objects, from 1 on, the first one its root."""
    made = b"%PDF-1.7\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    at = len(made)
    made += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    made += b"".join(b"%010d 00000 n \n" % place for place in places)
    return made + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, at)


W = b'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def test_zip_bombs_are_refused_before_they_are_whole(reader: Reader, tmp_path: pathlib.Path) -> None:
    bomb = packed(document=b"<w:document " + W + b">" + b" " * (60 << 20) + b"</w:document>")
    assert len(bomb) < 100_000
    error = refusal(reader, tmp_path, bomb, "a.docx").problem
    assert error.rule == "packed_bomb" and "word/document.xml" in error.message
    many = packed(**{f"word/{n}.xml": b"" for n in range(10_001)})
    assert refusal(reader, tmp_path, many, "a.docx").problem.rule == "document_too_large"


def test_xml_bombs_are_refused_at_their_declaration(reader: Reader, tmp_path: pathlib.Path) -> None:
    laughs = b"<!DOCTYPE d [<!ENTITY a 'ha'>" + b"".join(
        b"<!ENTITY %c '&%c;&%c;&%c;&%c;&%c;&%c;&%c;&%c;'>" % ((b,) + (a,) * 8)
        for a, b in zip(b"abcdefghi", b"bcdefghij", strict=True)
    )
    bomb = packed(document=laughs + b"]><w:document " + W + b"><w:p>&j;</w:p></w:document>")
    assert refusal(reader, tmp_path, bomb, "a.docx").problem.rule == "xml_entities"
    file = b"<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><w:document " + W + b">&a;</w:document>"
    assert refusal(reader, tmp_path, packed(document=file), "a.docx").problem.rule == "xml_entities"


def test_deep_nesting_is_refused(reader: Reader, tmp_path: pathlib.Path) -> None:
    deep = b"<w:document " + W + b">" + b"<w:sdt>" * 90_000 + b"</w:sdt>" * 90_000 + b"</w:document>"
    assert refusal(reader, tmp_path, packed(zipfile.ZIP_STORED, document=deep), "a.docx").problem.rule == "too_deep"
    assert refusal(reader, tmp_path, b"<div>" * 50_000 + b"x", "a.html").problem.rule == "too_deep"
    assert refusal(reader, tmp_path, b">" * 5_000 + b" x\n", "a.md").problem.rule == "too_deep"
    lists = "".join("  " * n + "- x\n" for n in range(400))
    assert refusal(reader, tmp_path, lists.encode(), "a.md").problem.rule == "too_deep"


def test_a_pdf_of_very_many_pages_is_refused(reader: Reader, tmp_path: pathlib.Path) -> None:
    pages = b"<</Type/Pages/Count 100000/Kids[" + b"3 0 R " * 100_000 + b"]>>"
    data = pdf(b"<</Type/Catalog/Pages 2 0 R>>", pages, b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>")
    error = refusal(reader, tmp_path, data, "a.pdf").problem
    assert error.rule == "document_too_large" and "100000 pages" in error.message


def test_a_pdf_whose_pages_hold_themselves_is_refused(reader: Reader, tmp_path: pathlib.Path) -> None:
    data = pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 9/Kids[2 0 R 2 0 R]>>")
    assert refusal(reader, tmp_path, data, "a.pdf").problem.rule in ("broken_document", "empty_file")


def test_a_stream_that_unpacks_to_gigabytes_ends_its_reader_and_nothing_else(
    reader: Reader, tmp_path: pathlib.Path
) -> None:
    packer = zlib.compressobj(1)
    piece = b"BT /F1 9 Tf (x) Tj ET\n" * 50_000
    stream = b"".join(packer.compress(piece) for _ in range(500)) + packer.flush()
    assert len(stream) < 8 << 20
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>"
    content = b"<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(stream), stream)
    data = pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 1/Kids[3 0 R]>>", page, content)
    error = refusal(reader, tmp_path, data, "a.pdf").problem
    assert error.rule == "document_too_large" and f"{MEMORY} bytes of memory" in error.message, error


def test_time_is_bounded_for_each_document(tmp_path: pathlib.Path) -> None:
    with Reader(memory_bytes=MEMORY, cpu_seconds=1) as reader:
        error = refusal(reader, tmp_path, b"*a* _b_ `c` [d](e)\n\n" * 150_000, "a.md").problem
    assert error.rule == "document_too_large" and "1 CPU seconds" in error.message


def test_noise_under_any_name_is_refused_by_name(reader: Reader, tmp_path: pathlib.Path) -> None:
    import random

    draw = random.Random(7)
    whole = as_docx(GOOD)
    for name in ("a.md", "a.txt", "a.html", "a.pdf", "a.docx"):
        noise = draw.randbytes(20_000)
        assert refusal(reader, tmp_path, noise, name).problem.rule in ("not_utf8", "not_text", "broken_document")
        assert refusal(reader, tmp_path, b"\x00" * 999, name).problem.rule in ("not_text", "empty_file")
        assert refusal(reader, tmp_path, b" \n\t", name).problem.rule == "empty_file"
    assert refusal(reader, tmp_path, whole[: len(whole) // 2], "a.docx").problem.rule == "truncated_document"
    for at in range(60, len(whole), len(whole) // 12):  # a byte turned anywhere: read, or refused by name
        turned = bytearray(whole)
        turned[at] ^= 0xFF
        (tmp_path / "turned").write_bytes(turned)
        try:
            reader.read(tmp_path / "turned", "a.docx", False)
        except UnreadableDocument as e:
            assert e.problem.rule in ("broken_document", "truncated_document", "not_text", "encrypted", "packed_bomb")


def test_what_is_no_document_is_named(reader: Reader, tmp_path: pathlib.Path) -> None:
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 600
    assert refusal(reader, tmp_path, ole, "a.docx").problem.rule == "not_text"
    locked = ole + "EncryptedPackage".encode("utf-16-le")
    assert refusal(reader, tmp_path, locked, "a.docx").problem.rule == "encrypted"
    assert "RTF" in refusal(reader, tmp_path, b"{\\rtf1 hello}", "a.txt").problem.message
    assert "no DOCX" in refusal(reader, tmp_path, packed(readme=b"x"), "a.docx").problem.message


def test_what_grows_with_the_square_does_not(tmp_path: pathlib.Path) -> None:
    """Each of these took minutes, and is read, or refused by name, within the second that it may take."""
    cells = b"<w:tc><w:p><w:r><w:t>x</w:t></w:r></w:p></w:tc>"
    row = b"<w:document " + W + b"><w:tbl><w:tr>" + cells * 30_000 + b"</w:tr></w:tbl></w:document>"
    styles = b"".join(b'<w:style w:styleId="s%d"><w:basedOn w:val="s%d"/></w:style>' % (n, n + 1) for n in range(4000))
    paragraphs = b'<w:p><w:pPr><w:pStyle w:val="s0"/></w:pPr><w:r><w:t>x</w:t></w:r></w:p>' * 3000
    chain = {
        "word/styles.xml": b"<w:styles " + W + b">" + styles + b"</w:styles>",
        "document": b"<w:document " + W + b">" + paragraphs + b"</w:document>",
    }
    path = tmp_path / "document"
    with Reader(memory_bytes=MEMORY, cpu_seconds=1) as reader:
        for data in (packed(zipfile.ZIP_STORED, document=row), packed(zipfile.ZIP_STORED, **chain)):
            path.write_bytes(data)
            assert reader.read(path, "a.docx", False).kind == "docx"
    deep = b"<svg>" * 300_000 + b"<code>" * 300_000
    with Reader(memory_bytes=MEMORY, cpu_seconds=1) as reader:
        assert refusal(reader, tmp_path, deep, "a.html").problem.rule == "too_deep"


def many_rows() -> bytes:
    row = b"<w:tr>" + b"<w:tc><w:p><w:r><w:t>x</w:t></w:r></w:p></w:tc>" * 9 + b"</w:tr>"
    return packed(
        zipfile.ZIP_STORED, document=b"<w:document " + W + b"><w:tbl>" + row * 120_000 + b"</w:tbl></w:document>"
    )


def many_letters() -> bytes:
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>"
    drawn = zlib.compress(b"BT /F1 9 Tf " + b"(a b c d e f g h) Tj 9 9 Td " * 400_000 + b"ET")
    content = b"<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(drawn), drawn)
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 1/Kids[3 0 R]>>", page, content, font
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("narrow", ["memory", "time"])
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("a.md", lambda: b"*a* `b`\n- c\n\n" * 2_000_000),
        ("a.txt", lambda: b"a b c d e f g h\n\n- i\n" * 1_500_000),
        ("a.html", lambda: b"<table>" + b"<tr><td>a<td>b<td>c" * 1_500_000),
        ("a.pdf", many_letters),
        ("a.docx", many_rows),
    ],
)
def test_each_reader_is_bounded_in_memory_and_in_time(
    tmp_path: pathlib.Path, name: str, made: Callable[[], bytes], narrow: str
) -> None:
    memory, seconds = (150 << 20, 60) if narrow == "memory" else (2 << 30, 1)
    with Reader(memory_bytes=memory, cpu_seconds=seconds) as reader:
        error = refusal(reader, tmp_path, made(), name).problem
    told = f"{memory} bytes of memory" if narrow == "memory" else "1 CPU seconds"
    assert error.rule == "document_too_large" and told in error.message, error


def test_a_reader_ends_with_its_worker_in_the_middle_of_a_document(tmp_path: pathlib.Path) -> None:
    os.mkfifo(endless := tmp_path / "endless")
    worker = (
        "import pathlib, sys\nfrom services.datasets.worker.documents.apart import Reader\n"
        "reader = Reader()\nreader._start()\nprint(reader._process.pid, flush=True)\n"
        "reader.read(pathlib.Path(sys.argv[1]), 'a.md', False)\n"
    )
    command = [sys.executable, "-c", worker, str(endless)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        held = eventually(lambda: opened(endless), what="a reader of the document")
        try:
            process.kill()
            eventually(lambda: not lives(pid), what="the end of the reader")
        finally:
            os.close(held)


def opened(pipe: pathlib.Path) -> int | None:
    """A handle to write to a pipe, once somebody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def lives(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
