"""PDFs as programs of other kinds write them: compressed objects, letters set one by one, no blank anywhere.

What tests of documents set with reportlab otherwise is set here by hand, as TeX,
word processors and scanners do.
"""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Sequence

BLANK = 300
"""Thousandths of the size between words, at least."""
_WIDTHS = {**dict.fromkeys("ijltfr.,;:'!()", 300), **dict.fromkeys("mwMW", 780)}
"""Of letters that are not 500 thousandths wide."""


def packed(*bodies: bytes, root: int = 1, more: bytes = b"") -> bytes:
    """A PDF of objects from 1 on, all but streams in a stream of objects, the table of places in a stream too."""
    made, places, inside = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", {}, []
    for number, body in enumerate(bodies, 1):
        if b"stream\n" in body:
            places[number] = (1, len(made), 0)
            made += b"%d 0 obj\n%s\nendobj\n" % (number, body)
        else:
            inside.append((number, body))
    holder = len(bodies) + 1
    head, data = b"", b""
    for at, (number, body) in enumerate(inside):
        head += b"%d %d " % (number, len(data))
        data += body + b" "
        places[number] = (2, holder, at)
    places[holder] = (1, len(made), 0)
    told = b"<</Type/ObjStm/N %d/First %d" % (len(inside), len(head))
    made += b"%d 0 obj\n%s\nendobj\n" % (holder, stream(head + data, told))
    at, count = len(made), holder + 2
    places[holder + 1] = (1, at, 0)
    table = b"\0" * 7 + b"".join(
        bytes([kind]) + where.to_bytes(4, "big") + third.to_bytes(2, "big")
        for kind, where, third in (places[n] for n in range(1, count))
    )
    told = b"<</Type/XRef/Size %d/W[1 4 2]/Root %d 0 R%s" % (count, root, more)
    return made + b"%d 0 obj\n%s\nendobj\nstartxref\n%d\n%%%%EOF\n" % (holder + 1, stream(table, told), at)


def stream(data: bytes, told: bytes = b"<<") -> bytes:
    """A packed stream."""
    data = zlib.compress(data)
    return b"%s/Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (told, len(data), data)


def by_hand(*pages: bytes, to_unicode: bytes = b"", differences: bytes = b"", more: bytes = b"") -> bytes:
    """A PDF of A4 pages by what they draw. Fonts: F1 upright, F2 bold; `more` goes into the trailer."""
    first = 8
    kids = b" ".join(b"%d 0 R" % (first + 2 * n) for n in range(len(pages)))
    widths = b" ".join(b"%d" % _WIDTHS.get(chr(n), 500) for n in range(256))
    cmap = b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange " + to_unicode + b" endcmap"
    bodies = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(pages), kids),
        *(
            b"<</Type/Font/Subtype/Type1/BaseFont/ABCDEF+Plain%s/FirstChar 0/LastChar 255/Widths[%s]"
            b"/FontDescriptor %d 0 R/Encoding<</BaseEncoding/WinAnsiEncoding/Differences[%s]>>%s>>"
            % (bold, widths, at, differences, b"/ToUnicode 7 0 R" if to_unicode else b"")
            for bold, at in ((b"", 5), (b"-Bold", 6))
        ),
        *(
            b"<</Type/FontDescriptor/FontName/ABCDEF+Plain%s/Flags 32/ItalicAngle 0/Ascent 700/Descent -200"
            b"/CapHeight 700/StemV 80/FontBBox[0 -200 1000 800]>>" % bold
            for bold in (b"", b"-Bold")
        ),
        stream(cmap),
    ]
    for n, drawn in enumerate(pages):
        fonts = b"/Resources<</Font<</F1 3 0 R/F2 4 0 R>>>>"
        bodies.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents %d 0 R%s>>" % (first + 2 * n + 1, fonts)
        )
        bodies.append(stream(drawn))
    return packed(*bodies, more=more)


def wide(text: str) -> int:
    """Thousandths of the size that its letters are wide, blanks aside."""
    return sum(_WIDTHS.get(letter, 500) for letter in text if letter != " ")


def shown(text: str, x: float, y: float, size: float = 10, font: str = "F1", blank: float = BLANK) -> bytes:
    """A line as TeX sets it: words are apart, and nothing stands between them."""
    words = f" -{blank:.0f} ".join(f"({word})" for word in escaped(text).split(" "))
    return f"BT /{font} {size} Tf {x} {y} Td [{words}] TJ ET\n".encode("latin-1")


def letter_by_letter(text: str, x: float, y: float, size: float = 10) -> bytes:
    """A line whose every letter has a place of its own, and blanks have none."""
    made = b""
    for letter in text:
        if letter != " ":
            made += f"BT /F1 {size} Tf 1 0 0 1 {x:.2f} {y} Tm ({escaped(letter)}) Tj ET\n".encode("latin-1")
        x += (BLANK if letter == " " else wide(letter)) / 1000 * size
    return made


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def column(lines: Sequence[str], x: float, y: float, size: float = 10, leading: float = 12) -> bytes:
    """Lines below one another, of one width but for the last."""
    most = max(wide(line) + BLANK * line.count(" ") for line in lines)
    made = b""
    for n, line in enumerate(lines):
        blank = (most - wide(line)) / max(1, line.count(" ")) if n + 1 < len(lines) else BLANK
        made += shown(line, x, y - n * leading, size, blank=blank)
    return made


def cut(text: str, width: int) -> Sequence[str]:
    """Lines that are full but for the last: words are cut by a hyphen at their ends, as TeX does where it must."""
    made, rest = [], text
    while len(rest) > width:
        line, word = rest[: width - 1], rest[width - 1 : width + 1]
        tail = line.rpartition(" ")[2]
        if len(tail) > 1 and tail.isalpha() and len(word) == 2 and word.isalpha() and "-" not in tail:
            made.append(line + "-")
            rest = rest[width - 1 :]
        else:
            line = textwrap.wrap(rest, width)[0]
            made.append(line)
            rest = rest[len(line) :].lstrip()
    return [*made, rest]
