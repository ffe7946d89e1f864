"""One Markdown text set as a PDF and as a DOCX, as people set documents: for tests that compare what is read of each.

The setter of the PDF puts a running head and a number on every page and
justifies; that of the DOCX uses Word's own styles and counts its lists.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from markdown_it import MarkdownIt

Runs = list[tuple[str, str]]
"""Texts, each with how it is set: "", "b", "i" or "code"."""


@dataclass(slots=True)
class Part:
    """A heading, a paragraph, an item, code or a table."""

    kind: str
    runs: Runs = field(default_factory=list)
    level: int = 0
    number: int | None = None
    rows: list[list[Runs]] = field(default_factory=list)
    text: str = ""


def parts(markdown: str) -> list[Part]:
    """A plain Markdown text as parts: headings, paragraphs, lists, fences and tables."""
    return list(_parts(MarkdownIt("commonmark").enable("table").parse(markdown)))


def _parts(tokens: list[Any]) -> Iterator[Part]:
    lists: list[int | None] = []
    item: int | None = None
    is_first = False
    rows: list[list[Runs]] = []
    in_table = False
    for at, token in enumerate(tokens):
        if token.type == "bullet_list_open":
            lists.append(None)
        elif token.type == "ordered_list_open":
            lists.append(1)
        elif token.type.endswith("_list_close"):
            lists.pop()
        elif token.type == "list_item_open":
            item, is_first = lists[-1], True
            if lists[-1] is not None:
                lists[-1] += 1
        elif token.type == "table_open":
            rows, in_table = [], True
        elif token.type == "table_close":
            in_table = False
            yield Part("table", rows=rows)
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "fence":
            yield Part("code", text=token.content.rstrip("\n"))
        elif token.type == "inline":
            runs = _runs(token.children)
            opened = tokens[at - 1]
            if in_table:
                rows[-1].append(runs)
            elif opened.type == "heading_open":
                yield Part("heading", runs, int(opened.tag[1:]))
            elif lists and is_first:
                is_first = False
                yield Part("item", runs, len(lists) - 1, item)
            else:
                yield Part("prose", runs)


def _runs(children: list[Any]) -> Runs:
    found: Runs = []
    how = ""
    for child in children:
        if child.type in ("strong_open", "em_open"):
            how = "b" if child.type == "strong_open" else "i"
        elif child.type in ("strong_close", "em_close"):
            how = ""
        elif child.type == "code_inline":
            found.append((child.content, "code"))
        elif child.type == "text" and child.content:
            found.append((child.content, how))
        elif child.type == "softbreak":
            found.append((" ", how))
    return found


def plain(runs: Runs) -> str:
    """The text of runs."""
    return "".join(text for text, _ in runs)


# PDF


def as_pdf(
    markdown: str,
    head: str = "Field methods",
    size: float = 11.5,
    columns: int = 1,
    leading: float = 1.42,
    margin_cm: float = 2.5,
) -> bytes:
    """The text as a PDF of A4 pages, with a running head and numbers where there is a head."""
    from reportlab.lib.enums import TA_JUSTIFY
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.lib.units import cm
    from reportlab.platypus import (
        BaseDocTemplate,
        Frame,
        PageTemplate,
        Paragraph,
        Preformatted,
        Spacer,
        Table,
        TableStyle,
    )

    body = ParagraphStyle(
        "body",
        fontName="Times-Roman",
        fontSize=size,
        leading=size * leading,
        alignment=TA_JUSTIFY,
        spaceAfter=size * 0.7,
    )
    heads = {
        n: ParagraphStyle(
            f"h{n}", fontName="Helvetica-Bold", fontSize=big, leading=big * 1.25, spaceBefore=big * 0.9,
            spaceAfter=big * 0.45, keepWithNext=1,
        )
        for n, big in ((1, 24), (2, 17), (3, 13.5))
    }  # fmt: skip
    code = ParagraphStyle("code", fontName="Courier", fontSize=9.5, leading=12.5, leftIndent=14, spaceAfter=size * 0.7)
    cell = ParagraphStyle("cell", parent=body, alignment=0, fontSize=10, leading=13, spaceAfter=0)
    story: list[Any] = []
    for part in parts(markdown):
        if part.kind == "heading":
            story.append(Paragraph(_marked(part.runs), heads[min(part.level, 3)]))
        elif part.kind == "prose":
            story.append(Paragraph(_marked(part.runs), body))
        elif part.kind == "item":
            indent = 20 + 18 * part.level
            style = ParagraphStyle(
                "item", parent=body, leftIndent=indent, bulletIndent=indent - 16, spaceAfter=size * 0.35
            )
            mark = "•" if part.number is None else f"{part.number}."
            story.append(Paragraph(_marked(part.runs), style, bulletText=mark))
        elif part.kind == "code":
            story += [Preformatted(part.text, code)]
        else:
            rows = [[Paragraph(_marked(runs), cell) for runs in row] for row in part.rows]
            width = (A4[0] - 2 * margin_cm * cm) / len(rows[0])
            table = Table(rows, colWidths=[width] * len(rows[0]), hAlign="LEFT")
            table.setStyle(
                TableStyle([("VALIGN", (0, 0), (-1, -1), "TOP"), ("LINEBELOW", (0, 0), (-1, 0), 0.6, "#000000")])
            )
            story += [table, Spacer(1, size)]
    out = io.BytesIO()

    def around(canvas: Any, document: Any) -> None:
        if not head:
            return
        canvas.setFont("Helvetica", 8.5)
        canvas.drawString(margin_cm * cm, A4[1] - 1.5 * cm, head)
        canvas.drawCentredString(A4[0] / 2, 1.4 * cm, str(canvas.getPageNumber()))

    gap = 0.8 * cm
    width = (A4[0] - 2 * margin_cm * cm - gap * (columns - 1)) / columns
    frames = [
        Frame(margin_cm * cm + n * (width + gap), 2.4 * cm, width, A4[1] - 5 * cm, leftPadding=0, rightPadding=0)
        for n in range(columns)
    ]
    document = BaseDocTemplate(out, pagesize=A4, invariant=1)
    document.addPageTemplates([PageTemplate(frames=frames, onPage=around)])
    document.build(story)
    return out.getvalue()


def _marked(runs: Runs) -> str:
    made = ""
    for text, how in runs:
        safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        made += {
            "": safe,
            "b": f"<b>{safe}</b>",
            "i": f"<i>{safe}</i>",
            "code": f'<font face="Courier">{safe}</font>',
        }[how]
    return made


# DOCX


def as_docx(markdown: str, each: Callable[[Any, Part], None] = lambda paragraph, part: None) -> bytes:
    """The text as a DOCX with Word's own styles; `each` sees every paragraph and what it was made of."""
    import docx

    document = docx.Document()
    restart = _Counted(document)
    for part in parts(markdown):
        if part.kind == "heading":
            made = document.add_heading("", part.level)
            _add(made, part.runs)
        elif part.kind == "prose":
            made = document.add_paragraph()
            _add(made, part.runs)
        elif part.kind == "item":
            made = document.add_paragraph(style="List Bullet" if part.number is None else "List Number")
            if part.number is not None:
                restart.count(made, part.number, part.level)
            _add(made, part.runs)
        elif part.kind == "code":
            for line in part.text.split("\n"):
                made = document.add_paragraph()
                made.add_run(line).font.name = "Courier New"
                each(made, part)
            continue
        else:
            table = document.add_table(len(part.rows), len(part.rows[0]))
            for i, row in enumerate(part.rows):
                for j, runs in enumerate(row):
                    _add(table.cell(i, j).paragraphs[0], runs)
            continue
        each(made, part)
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


class _Counted:
    """Lists that begin anew, as Word writes them."""

    def __init__(self, document: Any) -> None:
        self._numbering = document.part.numbering_part.numbering_definitions._numbering
        self._abstract = document.styles["List Number"].element.pPr.numPr.numId.val
        self._ident = 0

    def count(self, paragraph: Any, number: int, level: int) -> None:
        if number == 1 or not self._ident:
            base = next(n for n in self._numbering.num_lst if n.numId == self._abstract)
            made = self._numbering.add_num(base.abstractNumId.val)
            made.add_lvlOverride(ilvl=level).add_startOverride(1)
            self._ident = made.numId
        properties = paragraph._p.get_or_add_pPr().get_or_add_numPr()
        properties.get_or_add_numId().val = self._ident
        properties.get_or_add_ilvl().val = level


def _add(paragraph: Any, runs: Runs) -> None:
    for text, how in runs:
        run = paragraph.add_run(text)
        run.bold, run.italic = how == "b" or None, how == "i" or None
        if how == "code":
            run.font.name = "Courier New"
