"""Readers of Markdown, plain text, HTML and DOCX: which blocks they see, and where."""

from __future__ import annotations

import io

import docx
import pytest
from docx.oxml import OxmlElement, parse_xml
from docx.oxml.ns import nsdecls, qn

from services.datasets.worker.documents import kinds, patterns
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, MEANING, PROSE, TABLE, TERM, Block, Document
from services.datasets.worker.found import Unreadable

Told = tuple[str, str]


def told(document: Document) -> list[Told]:
    return [(b.left or b.kind, b.text) for b in document.blocks]


def at(text: str, block: Block) -> str:
    """What stands at a block's span."""
    return text[block.span.begin : block.span.end]


MARKDOWN = """---
title: Guide
---

Rain *gauge*
============

Read it at [seven](http://x), and `zero` it;\r
then go\\
home.

[![badge](a.png)](b)

* one
  more
* two

  still two
  1. deep

> quoted `x`

<details><summary>Why</summary><p>Because of <b>rain</b>.</p></details>

~~~{.python}
a  = 1
~~~

| a | b |
|---|---|
| 1 | x \\| y |
"""


def test_markdown() -> None:
    document = kinds.read(MARKDOWN.encode(), "guide.md")
    assert told(document) == [
        ("front_matter", "---\ntitle: Guide\n---"),
        (HEADING, "Rain gauge"),
        (PROSE, "Read it at seven, and `zero` it; then go\nhome."),
        ("links_only", ""),
        (ITEM, "one more"),
        (ITEM, "two"),
        (PROSE, "still two"),
        (ITEM, "deep"),
        (PROSE, "quoted `x`"),
        (PROSE, "Why"),
        (PROSE, "Because of rain."),
        (CODE, "a  = 1"),
        (TABLE, "| a | b |\n| --- | --- |\n| 1 | x \\| y |"),
    ]
    by_text = {b.text: b for b in document.blocks}
    assert at(MARKDOWN, by_text["one more"]) == "* one\n  more"
    assert at(MARKDOWN, by_text["deep"]) == "  1. deep" and by_text["deep"].number == 1 and by_text["deep"].level == 1
    assert by_text["Read it at seven, and `zero` it; then go\nhome."].span[1:3] == (8, 10)
    assert by_text["a  = 1"].language == "python" and by_text["Rain gauge"].lead == ""


HTML = """<!doctype html><html><head><title>A guide</title><style>p {}</style></head><body>
<header><a href=/>Home</a></header><nav><ul><li><a href=x>Here</a></ul></nav>
<main><h1><a href="#x">The <em>gauge</em></a></h1><p>First<p>Second, with <code>zero</code><br>and more
<ul><li>one<li>two<ol start=3><li>deep</ol></ul>
<dl><dt>Blank<dd>A sample without it.</dl>
<pre><code class="language-python">a  = 1
  b = 2</code></pre>
<table><tr><th>a<th>b<tr><td>1<td>x &amp; y</table>
<p><b>Bold?</b> Not a lead alone.</p><script>if (a<b) alert("x")</script>
<p><a href=y>only a link</a></main>
<footer>Imprint</footer></body></html>"""


def test_html() -> None:
    document = kinds.read(HTML.encode(), "guide.html")
    assert document.title == "A guide"
    assert told(document) == [
        ("navigation", "Home"),
        ("navigation", "Here"),
        (HEADING, "The gauge"),
        (PROSE, "First"),
        (PROSE, "Second, with `zero`\nand more"),
        (ITEM, "one"),
        (ITEM, "two"),
        (ITEM, "deep"),
        (TERM, "Blank"),
        (MEANING, "A sample without it."),
        (CODE, "a  = 1\n  b = 2"),
        (TABLE, "| a | b |\n| --- | --- |\n| 1 | x & y |"),
        (PROSE, "Bold? Not a lead alone."),
        ("links_only", "only a link"),
        ("navigation", "Imprint"),
    ]
    by_text = {b.text: b for b in document.blocks}
    assert at(HTML, by_text["Second, with `zero`\nand more"]).startswith("Second, with <code>zero</code><br>and more")
    assert by_text["deep"].number == 3 and by_text["deep"].level == 1
    assert by_text["a  = 1\n  b = 2"].language == "python" and by_text["Bold? Not a lead alone."].lead == "Bold?"
    assert by_text["| a | b |\n| --- | --- |\n| 1 | x & y |"].span.first == 8


@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "utf-8"])
def test_html_in_the_encoding_that_it_names(charset: str) -> None:
    page = f'<meta charset="{charset}"><p>Grüße von der Weser'
    assert told(kinds.read(page.encode(charset), "a.html")) == [(PROSE, "Grüße von der Weser")]


TEXT = """FIELD GUIDE

1. The gauge

It is read at seven
and written down.

   - rinse it
     well
   - dry it

Notes
-----
See below:

    a = 1
      b = 2

* * *

Chapter 2: More

3. may go on with a list.
"""


def test_plain_text() -> None:
    document = kinds.read(TEXT.encode(), "guide.txt")
    assert told(document) == [
        (HEADING, "FIELD GUIDE"),
        (HEADING, "1. The gauge"),
        (PROSE, "It is read at seven and written down."),
        (ITEM, "rinse it well"),
        (ITEM, "dry it"),
        (HEADING, "Notes"),
        (PROSE, "See below:"),
        (CODE, "a = 1\n  b = 2"),
        (HEADING, "Chapter 2: More"),
        (ITEM, "may go on with a list."),
    ]
    by_text = {b.text: b for b in document.blocks}
    assert at(TEXT, by_text["rinse it well"]) == "   - rinse it\n     well"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str) -> None:
    document = kinds.read("Grüße\n\nvom Fluss\r\nund mehr\r\n".encode(encoding), "a.txt")
    assert told(document) == [(PROSE, "Grüße"), (PROSE, "vom Fluss und mehr")]
    assert document.blocks[1].span[1:3] == (3, 4)
    with pytest.raises(Unreadable) as caught:
        kinds.read("Gr\xfc\xdfe".encode("latin-1"), "a.txt")
    assert caught.value.problem.rule == "not_utf8" and caught.value.line == 1


def written(document: docx.document.Document) -> Document:
    out = io.BytesIO()
    document.save(out)
    return kinds.read(out.getvalue(), "a.docx")


def test_docx() -> None:
    made = docx.Document()
    made.add_heading("Field guide", 0)
    made.add_heading("Gauge", 1)
    one = made.add_paragraph("Read it ")
    one.add_run("at seven").bold = True
    one.add_run(" and ")
    one.add_run("zero").font.name = "Consolas"
    one.add_run(" it.\ttwice")
    made.add_paragraph("Drift", style="List Bullet")
    for line in ("a = 1", "", "b = 2"):
        made.add_paragraph().add_run(line).font.name = "Courier New"
    table = made.add_table(2, 2)
    for n, cell in enumerate(c for row in table.rows for c in row.cells):
        cell.text = f"c{n}"
    box = made.add_table(1, 1)
    box.cell(0, 0).text = "A box around a word of warning."
    made.add_paragraph("After it.")
    found = written(made)
    assert told(found) == [
        (HEADING, "Field guide"),
        (HEADING, "Gauge"),
        (PROSE, "Read it at seven and `zero` it. twice"),
        (ITEM, "Drift"),
        (CODE, "a = 1\n\nb = 2"),
        (TABLE, "| c0 | c1 |\n| --- | --- |\n| c2 | c3 |"),
        (PROSE, "A box around a word of warning."),
        (PROSE, "After it."),
    ]
    assert [b.level for b in found.blocks[:2]] == [1, 2]
    # Paragraphs count in cells too, as they stand in the part.
    numbers = [(b.span.first, b.span.last) for b in found.blocks[3:]]
    assert numbers == [(4, 4), (5, 7), (8, 11), (12, 12), (13, 13)]


def test_docx_deleted_text_and_notes_are_not_read_and_notes_are_told() -> None:
    made = docx.Document()
    one = made.add_paragraph("Kept ")
    gone = OxmlElement("w:del")
    run = OxmlElement("w:r")
    text = OxmlElement("w:delText")
    text.text = "deleted"
    run.append(text)
    gone.append(run)
    one._p.append(gone)
    one.add_run("text.")
    style = made.add_paragraph("Gauge .... 3")
    style.style = made.styles.add_style("toc 1", 1)
    found = written(made)
    assert told(found) == [(PROSE, "Kept text."), ("table_of_contents", "Gauge .... 3")]
    assert qn("w:del") in {e.tag for e in one._p}


def test_content_decides_where_the_name_says_otherwise() -> None:
    document = kinds.read(HTML.encode(), "guide.txt")
    assert document.kind == "html" and document.said[0][1].rule == "wrong_suffix"


def test_places_in_html_are_those_of_the_text_whatever_ends_lines() -> None:
    for end in ("\n", "\r\n"):
        page = end.join(
            ["<h1>", "  Rain 🌧 e\u0301</h1>", "<div>", "", "\tIt falls", "on hills.", "", "</div>", "<p>Dry.</p>"]
        )
        document = kinds.read(b"\xef\xbb\xbf" + page.encode(), "a.html")
        places = [(at(page, b), b.span.first, b.span.last) for b in document.blocks]
        assert places == [("Rain 🌧 e\u0301", 2, 2), (f"It falls{end}on hills.", 5, 6), ("Dry.", 9, 9)]


def test_what_html_shows_beside_text_is_no_text_of_it() -> None:
    page = (
        "<p>Press <svg><title>Icon</title><p>cut</p></svg> to begin.<noscript><p>No script!</p></noscript>"
        "<template><ul><li>None<li>No</template><h2>Use</h2><ol><li>Rinse it.</ol>"
        "<p>The sum <math><mi>x</mi></math> is told.<video><p>No film.</video>"
    )
    document = kinds.read(page.encode(), "a.html")
    expected = [(PROSE, "Press to begin."), (HEADING, "Use"), (ITEM, "Rinse it."), (PROSE, "The sum is told.")]
    assert told(document) == expected and document.title == ""
    ((_, problem),) = document.said
    assert problem.rule == "formulas_left_out" and problem.message.startswith("1 formula was not read")


@pytest.mark.parametrize("charset", ["utf-16", "idna", "punycode", "undefined", "rot13", "unicode_escape", "no-such"])
def test_html_that_names_no_charset_of_texts_is_utf8(charset: str) -> None:
    page = f'<meta charset="{charset}"><p>Grüße von der Weser'
    assert told(kinds.read(page.encode(), "a.html")) == [(PROSE, "Grüße von der Weser")]


def test_comments_before_a_text_hide_no_page_and_take_no_time() -> None:
    many = "<!-- a -->\n" * 300
    assert (
        kinds.read(f"{many}# Rain\n".encode(), "a.md").kind == "markdown"
    )  # 2 to the 300th ways to tell comments apart
    for head in ("\ufeff", "<?xml version='1.0'?>\n<!-- a --><!-- b -->"):
        assert kinds.read(f"{head}<html><p>Rain".encode(), "a.md").kind == "html"


def test_underlined_headings_may_follow_one_another_without_end() -> None:
    text = "".join(f"Part {n}\n-----\n" for n in range(3000)) + "And text.\n"
    blocks = kinds.read(text.encode(), "a.txt").blocks
    assert [b.kind for b in blocks] == [HEADING] * 3000 + [PROSE]
    assert at(text, blocks[2999]) == "Part 2999\n-----" and at(text, blocks[-1]) == "And text."


def test_lines_of_signs_take_time_by_their_length_alone() -> None:
    rule = "a\n---\n---\n" + " " * 20_000 + "x\n"
    assert [b.kind for b in kinds.read(rule.encode(), "a.txt").blocks] == [HEADING, PROSE]
    assert not patterns.is_dotted("a" + " ." * 50_000 + "x") and patterns.is_dotted("The gauge . . . . . 12")
    for line, is_one in (("1.2 Rain....... 7", True), ("Rain ……… 7", True), ("…… 7", False), ("Rain... 7", False)):
        assert patterns.is_dotted(line) is is_one, line
    assert not patterns.is_dotted("Rain ........ 12345") and not patterns.is_dotted("Rain ........")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.md", "a.txt"])
def test_places_are_those_of_the_decoded_file(name: str, mark: str, end: str) -> None:
    lines = [
        "1. Gauge 🌧",
        "",
        "It\tis re\u0301ad 𝔞t\u2028seven",
        "and  written.",
        "",
        "- one 🌧",
        "- two",
        "",
        "\tcode  🌧",
        "",
    ]
    text = end.join(lines)
    document = kinds.read((mark + text).encode(), name)
    assert len(document.blocks) > 3
    for block in document.blocks:
        shown = at(text, block)
        assert shown.split()[-1] == block.text.split()[-1] and set(block.text.split()) <= set(shown.split())
        assert text[: block.span.begin].count(end) + 1 == block.span.first
        assert block.span.first + shown.count(end) == block.span.last


def test_pictures_within_text_are_counted() -> None:
    page = "# Gauge {#gauge .top}\n\nSee ![a](b.png) and ![c](d.png).\n\n![alone](e.png)\n\n- one ![f](g.png)\n"
    document = kinds.read(page.encode(), "a.md")
    assert told(document) == [(HEADING, "Gauge"), (PROSE, "See and ."), ("picture", ""), (ITEM, "one")]
    html = kinds.read(b"<p>See <img src=a> here<p><img src=b><nav>x<img src=c></nav>", "a.html")
    out = io.BytesIO()
    made = docx.Document()
    made.add_paragraph("See it here").add_run()._r.append(OxmlElement("w:drawing"))
    made.add_paragraph().add_run()._r.append(OxmlElement("w:drawing"))
    made.save(out)
    for found, count in ((document, 3), (html, 1), (kinds.read(out.getvalue(), "a.docx"), 1)):
        ((_, problem),) = found.said
        assert problem.rule == "picture" and problem.message.startswith(f"{count} picture"), problem


def test_a_long_table_without_end_tags_is_one_table() -> None:
    rows = "".join(f"<tr><td>{n}<td>x" for n in range(1000))
    page = f"<table><caption>Numbers<thead><tr><th>n<th>x<tbody>{rows}</table><p>Behind it."
    caption, table, prose = kinds.read(page.encode(), "a.html").blocks
    assert (caption.text, prose.text) == ("Numbers", "Behind it.") and table.kind == TABLE
    assert table.cells == (("n", "x"), *((str(n), "x") for n in range(1000)))


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("title: Rain", "Rain"),
        ("title: 'The gauge: how'", "The gauge: how"),
        ('title = "Rain"', "Rain"),
        ("subtitle: no", ""),
        ("title: >", ""),
        ("title:", ""),
        ("title: " + "a " * 30_000, ("a " * 100).strip()),
    ],
)
def test_the_title_that_stands_before_the_text(line: str, title: str) -> None:
    fence = "+++" if "=" in line else "---"
    document = kinds.read(f"{fence}\nlayout: page\n{line}\n{fence}\n## How\n\nIt is read.\n".encode(), "a.md")
    assert document.title.strip() == title


def test_paragraphs_of_a_docx_count_as_they_stand_in_it() -> None:
    made, out = docx.Document(), io.BytesIO()
    paragraph = made.add_paragraph("Before the box.")
    run = paragraph.add_run()._r
    content = "<w:txbxContent><w:p><w:r><w:t>In the box.</w:t></w:r></w:p></w:txbxContent>"
    run.append(
        parse_xml(
            '<mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006" '
            f'{nsdecls("w")}><mc:Choice Requires="wps">{content}</mc:Choice><mc:Fallback>{content}</mc:Fallback>'
            "</mc:AlternateContent>"
        )
    )
    made.add_paragraph("Behind the box.")
    made.save(out)
    there = list(made.element.body.iter(qn("w:p")))
    blocks = kinds.read(out.getvalue(), "a.docx").blocks
    assert sorted(b.text for b in blocks) == ["Before the box.", "Behind the box.", "In the box."]
    for block in blocks:
        assert block.text in "".join(there[block.span.first - 1].itertext())
    assert blocks[-1].span.first == len(there) == 4


def test_a_table_that_holds_a_page_together_is_what_lies_in_it() -> None:
    inner = "<table><tr><th>sign<th>meaning<tr><td>red<td>stop<ul><li>at once</ul></table>"
    page = "<table><tr><td><a href=x>Home</a><td><h1>Gauges</h1><p>Read it.<ol><li>Rinse.</ol>"
    page += f"{inner}<pre>a  = 1</pre></table>"
    document = kinds.read(page.encode(), "a.html")
    assert told(document) == [
        ("links_only", "Home"),
        (HEADING, "Gauges"),
        (PROSE, "Read it."),
        (ITEM, "Rinse."),
        (TABLE, "| sign | meaning |\n| --- | --- |\n| red | stop at once |"),
        (CODE, "a  = 1"),
    ]
    assert at(page, document.blocks[4]) == inner.removesuffix("</table>")
