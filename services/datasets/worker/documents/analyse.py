"""The analyser: blocks in, items out, and of every other block why it is in none.

Law of this room: pure and deterministic; the same blocks give the same items.
Every block is in an item, asks for one, or is left out by a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from services.datasets.worker.documents import items, patterns, sections, wording
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, PROSE, Block, Document, Span
from services.datasets.worker.documents.items import Draft
from services.datasets.worker.documents.sections import Section

MOST_CHARACTERS = 6000
"""Of an answer; a longer one is cut between blocks."""


@dataclass(frozen=True, slots=True)
class Item:
    """What becomes a row."""

    rule: str
    question: str
    """Empty for a plain text."""
    answer: str
    section: str
    """The headings that it stands below."""
    spans: tuple[Span, ...]
    blocks: tuple[int, ...]
    """The blocks that it was made of, its question's too."""


@dataclass(frozen=True, slots=True)
class Found:
    """A document, analysed."""

    items: Sequence[Item]
    left: Mapping[int, str]
    """Blocks that are in no item, with the rule that left them out."""


def analyse(document: Document, language: str) -> Found:
    """The items of a document, each asked for in its language."""
    words = wording.of_language(language)
    blocks, places = _kept(document)
    left: dict[int, str] = {}
    made: list[Item] = []
    for section in sections.cut(blocks, document.title):
        _leave_out_whole(section, left)
        drafts = _drafts(section, left)
        for draft in drafts:
            made += _items(section, draft, words)
        for n in section.left():
            left[n] = "code_without_prose" if blocks[n].kind == CODE else "no_heading"
        if section.heading is not None and not drafts and not section.has_parts:
            left.setdefault(section.heading, "lone_heading")
    made.sort(key=lambda item: (min(item.blocks), item.rule))
    made = _told_apart(made, words)
    return _placed(document, places, made, left)


def texts(document: Document) -> Found:
    """The sections of a document as plain texts, their headings on top."""
    blocks, places = _kept(document)
    left: dict[int, str] = {}
    made: list[Item] = []
    for section in sections.cut(blocks, ""):
        _leave_out_whole(section, left)
        body = section.left()
        if not body and section.heading is not None:
            if not section.has_parts:
                left.setdefault(section.heading, "lone_heading")
            continue
        own = [] if section.heading is None else [section.heading]
        for number, run in enumerate(_parts(blocks, body)):
            taken = (*own, *run) if number == 0 else tuple(run)
            text = sections.written(blocks[n] for n in taken)
            path = " › ".join(section.path)
            made.append(Item("text", "", text, path, (), taken))
    return _placed(document, places, made, left)


def _kept(document: Document) -> tuple[list[Block], list[int]]:
    """What its reader did not leave out, and the number of each in the document."""
    places = [n for n, block in enumerate(document.blocks) if not block.left]
    return [document.blocks[n] for n in places], places


def _placed(document: Document, places: Sequence[int], made: Sequence[Item], left: Mapping[int, str]) -> Found:
    """What was found, by the numbers and places of the whole document."""
    whole = []
    for item in made:
        taken = tuple(places[n] for n in item.blocks)
        whole.append(replace(item, blocks=taken, spans=sections.spans(document.blocks, taken)))
    by_reader = {n: block.left for n, block in enumerate(document.blocks) if block.left}
    return Found(whole, by_reader | {places[n]: reason for n, reason in left.items()})


def _leave(section: Section, numbers: Sequence[int], reason: str, left: dict[int, str]) -> None:
    for n in numbers:
        section.free.discard(n)
        left[n] = reason


def _leave_out_whole(section: Section, left: dict[int, str]) -> None:
    """Leaves out sections that hold no text to learn from, and lists of contents wherever they stand."""
    topic = section.topic
    reason = ""
    if patterns.CONTENTS.fullmatch(topic):
        reason = "table_of_contents"
    elif patterns.REFERENCES.fullmatch(topic):
        reason = "references"
    if reason and section.heading is not None:
        _leave(section, section.left(), reason, left)
        left[section.heading] = reason
        return
    dotted = [n for n in section.left() if patterns.is_dotted(section.blocks[n].text)]
    if len(dotted) > 2:
        _leave(section, dotted, "table_of_contents", left)


def _drafts(section: Section, left: dict[int, str]) -> list[Draft]:
    """The items of a section; each block that a rule looked at is in one of them, or left out."""
    drafts: list[Draft] = []
    for rule in items.RULES:
        for draft in rule(section):
            if not set(draft.answer) | set(draft.asked) <= section.free:
                continue
            if (
                draft.rule == "heading"
                and not draft.is_whole
                and drafts
                and sections.words(_text(section, draft)) < items.LEAST_REST
            ):
                _share_out(section, draft.answer, drafts, left)
            elif not items.is_too_short(section, draft):
                section.free -= {*draft.answer, *draft.asked}
                drafts.append(draft)
            elif draft.rule == "heading":
                _leave(section, draft.answer, "too_short", left)
    return drafts


def _text(section: Section, draft: Draft) -> str:
    return sections.written(section.blocks[n] for n in draft.answer)


def _share_out(section: Section, rest: Sequence[int], drafts: list[Draft], left: dict[int, str]) -> None:
    """Gives the few words that are left of a section to the steps, table or code beside them; else they only lead."""
    for n in (*reversed(rest), *rest):  # one may stand beside another that was given away
        beside = (i for i, d in enumerate(drafts) if d.rule in items.TAKE_MORE and {n - 1, n + 1} & set(d.answer))
        at = next(beside, None)
        if at is not None and n in section.free:
            section.free.discard(n)
            drafts[at] = replace(drafts[at], answer=tuple(sorted((*drafts[at].answer, n))))
    _leave(section, [n for n in rest if n in section.free], "lead_in", left)


def _items(section: Section, draft: Draft, words: wording.Words) -> list[Item]:
    blocks = section.blocks
    above = section.above if draft.above is None else draft.above
    question = draft.topic if draft.is_asked else wording.ask(words, draft.wording or _word(draft), draft.topic, above)
    made = []
    parts = _parts(blocks, draft.answer)
    for number, run in enumerate(parts, 1):
        answer = sections.written(_shown(blocks, run))[draft.cut if number == 1 else 0 :]
        own = draft.asked if number == 1 else ()
        asked = wording.part(words, question, number, len(parts))
        path = " › ".join(section.path)
        taken = tuple(sorted((*own, *run)))
        made.append(Item(draft.rule, asked, answer, path, (), taken))
    return made


def _told_apart(made: Sequence[Item], words: wording.Words) -> list[Item]:
    """Items, but that those which ask the same and answer otherwise are counted: one question has one answer."""
    answers: dict[str, list[str]] = {}
    for item in made:
        known = answers.setdefault(item.question, [])
        if item.answer not in known:
            known.append(item.answer)
    numbers = {q: {answer: n for n, answer in enumerate(found, 1)} for q, found in answers.items() if len(found) > 1}
    return [
        replace(i, question=wording.part(words, i.question, numbers[i.question][i.answer], len(numbers[i.question])))
        if i.question in numbers
        else i
        for i in made
    ]


def _word(draft: Draft) -> str:
    return "heading" if draft.rule == "question" else draft.rule


def _shown(blocks: Sequence[Block], run: Sequence[int]) -> list[Block]:
    """Blocks of an answer; an item that answers alone is no list."""
    shown = [blocks[n] for n in run]
    if shown and shown[0].kind == ITEM and not any(b.kind == ITEM and b.level <= shown[0].level for b in shown[1:]):
        return [replace(shown[0], kind=PROSE, level=0), *shown[1:]]
    return shown


def _parts(blocks: Sequence[Block], numbers: Sequence[int]) -> list[list[int]]:
    """Blocks in runs that are not too long; code stays with what stands before it."""
    parts: list[list[int]] = [[]]
    size = 0
    for n in numbers:
        length = len(blocks[n].text)
        if parts[-1] and size + length > MOST_CHARACTERS and blocks[n].kind not in (CODE, HEADING):
            parts.append([])
            size = 0
        parts[-1].append(n)
        size += length
    return [part for part in parts if part]
