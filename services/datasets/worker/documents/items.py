"""The rules by which blocks become items; each takes from a section what is surely its own.

Law of this room: pure. A rule takes whole blocks, and none that another took;
what it gives tells what is asked and which blocks answer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.datasets.worker.documents import patterns, sections, wording
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, MEANING, PROSE, TABLE, TERM
from services.datasets.worker.documents.sections import Section, words

LEAST_WORDS = 5
LEAST_REST = 30
"""Words that are left of a section: fewer are no item of their own beside others."""
TAKE_MORE = ("procedure", "code", "table")
_MOST_SHOWN = 80
_MOST_TOPIC_WORDS = 15
_MOST_TOLD = 2000


@dataclass(frozen=True, slots=True)
class Draft:
    """An item on its way: what it is about, and the blocks that answer."""

    rule: str
    topic: str
    answer: tuple[int, ...]
    """Blocks whose text is the answer."""
    asked: tuple[int, ...] = ()
    """Blocks whose text is the question."""
    is_asked: bool = False
    """The topic is the question, word for word."""
    wording: str = ""
    """The sentence to ask by, where it is not the rule's own."""
    above: str | None = None
    """What the topic belongs to, where it is not the section's."""
    is_whole: bool = False
    """It is an item of its own, however short."""
    cut: int = 0
    """Characters of the answer that belong to the question, as in "A: "."""


def questions(section: Section) -> Iterator[Draft]:
    """A heading that asks, with all below it; and pairs of a question and an answer."""
    blocks = section.blocks
    if section.heading is not None and wording.is_question(section.topic):
        body = tuple(section.left())
        if body:
            yield Draft("question", section.topic, body, (), True)
        return
    for n in section.left():
        if n not in section.free or blocks[n].kind not in (PROSE, ITEM):
            continue
        block = blocks[n]
        mark = patterns.QUESTION_MARK.match(block.text)
        is_bold = bool(block.lead) and wording.is_question(block.lead) and block.lead == block.text.strip()
        answer = section.neighbour(n, 1)
        if (mark or is_bold) and answer is not None and blocks[answer].kind in (PROSE, ITEM):
            said = patterns.ANSWER_MARK.match(blocks[answer].text)
            if said or is_bold:
                asked = block.text[mark.end() if mark else 0 :].strip()
                yield Draft("question", asked, (answer,), (n,), True, cut=said.end() if said else 0)


def definitions(section: Section) -> Iterator[Draft]:
    """Terms with their meaning: lists of definitions, glossaries, sentences that say what something is."""
    blocks = section.blocks
    is_glossary = any(map(patterns.is_glossary, section.path[-2:]))
    for n in section.left():
        block = blocks[n]
        if n not in section.free:
            continue
        if block.kind == TERM:
            meanings: list[int] = []
            while (after := section.neighbour(n + len(meanings), 1)) is not None and blocks[after].kind == MEANING:
                meanings.append(after)
            if meanings:
                yield Draft("definition", block.text, tuple(meanings), (n,))
        elif block.kind in (PROSE, ITEM) and block.level == 0:
            term = patterns.term_of(block.text, block.lead, is_glossary)
            if term and words(block.text) - words(term) >= LEAST_WORDS:
                yield Draft("definition", term, (n,))


def principles(section: Section) -> Iterator[Draft]:
    """What a document holds to: a heading that counts one, what stands in a section of them, each by its name."""
    blocks = section.blocks
    heading = blocks[section.heading].text if section.heading is not None else ""
    body = tuple(section.left())
    numbered = patterns.PRINCIPLE_HEADING.search(heading)
    if body and numbered and numbered.end() < len(heading.strip()):
        yield Draft("principle", heading[numbered.end() :].strip(), body)
        return
    if not patterns.PRINCIPLES.search(section.topic):
        around = section.path[-2:-1]
        if body and any(map(patterns.PRINCIPLES.search, around)) and not section.has_parts:
            yield Draft("principle", section.topic, body)
        return
    for run in section.runs(ITEM):
        run = [n for n in run if blocks[n].level == 0]
        named = [(n, patterns.name_of(blocks[n].text, blocks[n].lead)) for n in run]
        if all(name for _, name in named):
            for n, name in named:
                end = _end_of_item(section, n)
                yield Draft("principle", name, tuple(range(n, end)), above="")
        elif len(run) > 1 and blocks[run[0]].number is None:
            whole = tuple(range(run[0], _end_of_item(section, run[-1])))
            yield Draft("principle", section.topic, whole, wording="principles")


def procedures(section: Section) -> Iterator[Draft]:
    """Steps in order: a counted list, with the sentence that leads to it."""
    blocks = section.blocks
    taken = 0
    for run in section.runs(ITEM):
        for begin, end in _counted(section, run):
            steps = [n for n in range(begin, end) if blocks[n].kind == ITEM and blocks[n].level == blocks[begin].level]
            if len(steps) < 2:
                continue
            intro = section.neighbour(begin, -1)
            if intro is not None and (blocks[intro].kind != PROSE or blocks[intro].level):
                intro = None
            topic = section.topic
            if (taken or not topic) and intro is not None:
                topic = f"{topic}: {_told_by(blocks[intro].text)}".strip(": ")
            if not topic:  # nothing names them
                continue
            taken += 1
            answer = (*(() if intro is None else (intro,)), *range(begin, end))
            yield Draft("procedure", topic, answer)


def tables(section: Section) -> Iterator[Draft]:
    """A table, with the sentence before it or below it that names it."""
    blocks = section.blocks
    runs = list(section.runs(TABLE))
    several = sum(map(len, runs)) > 1
    for run in runs:
        for n in run:
            if len(blocks[n].cells) < 2:
                continue
            before, after = _prose_beside(section, n, -1), _prose_beside(section, n, 1)
            if after is not None and not _is_caption(blocks[after].text):
                after = None
            if before is not None and not (_is_caption(blocks[before].text) or blocks[before].text.endswith(":")):
                before = None
            caption = next((blocks[m].text for m in (before, after) if m is not None), "")
            answer = tuple(m for m in (before, n, after) if m is not None)
            if _is_caption(caption):
                yield Draft("table", _caption(caption), answer, above=section.topic)
            else:
                named = [cell for cell in blocks[n].cells[0] if any(map(str.isalpha, cell))]
                columns = (
                    f": {', '.join(named or filter(None, blocks[n].cells[0]))}" if several or not section.topic else ""
                )
                if topic := f"{section.topic}{columns}".lstrip(": "):
                    yield Draft("table", topic, answer)


def codes(section: Section) -> Iterator[Draft]:
    """Code, with the prose before it and behind it."""
    blocks = section.blocks
    found = [n for run in section.runs(CODE) for n in run]
    for place, n in enumerate(found):
        if n not in section.free:
            continue
        end = n + 1
        while end in section.free and blocks[end].kind == CODE:  # as what it prints stands below it
            end += 1
        before = _prose_beside(section, n, -1)
        after = _prose_beside(section, end - 1, 1)
        if after is not None and (blocks[after].text.endswith(":") or section.neighbour(after, 1) in found):
            after = None
        topic = section.topic
        said = "" if before is None else _told_by(blocks[before].text)
        if not topic and not said and after is not None:
            said = _told_by(blocks[after].text)
        if not topic and not said:  # nothing names it
            continue
        if said and (place or not topic):
            topic = f"{topic}: {said}".lstrip(": ")
        elif place:
            topic = f"{topic}: {blocks[n].text.lstrip().partition(chr(10))[0][:_MOST_SHOWN]}"
        answer = (*(() if before is None else (before,)), *range(n, end), *(() if after is None else (after,)))
        yield Draft("code", topic, answer, wording="console" if blocks[n].text.lstrip().startswith("$ ") else "")


def headings(section: Section) -> Iterator[Draft]:
    """What is left of a section, asked for by its heading; what begins with a heading of its own by that."""
    body = section.left()
    own = [place for place, n in enumerate(body) if patterns.is_headed(section.blocks[n])]
    if not section.topic or not body:
        return
    if len(own) < 2:
        yield Draft("heading", section.topic, tuple(body))
        return
    if own[0]:
        yield Draft("heading", section.topic, tuple(body[: own[0]]))
    for begin, end in itertools.pairwise([*own, len(body)]):
        block = section.blocks[body[begin]]
        name = block.lead.strip().rstrip(".:")
        yield Draft("heading", name, tuple(body[begin:end]), above=section.topic, is_whole=True)


RULES: Sequence[Callable[[Section], Iterator[Draft]]] = (
    questions, definitions, principles, procedures, tables, codes, headings,
)  # fmt: skip
"""In this order: the surest first, what is left last."""


def _end_of_item(section: Section, n: int) -> int:
    """The block behind an item and what lies in it."""
    blocks, level = section.blocks, section.blocks[n].level
    end = n + 1
    while end in section.free and blocks[end].level > level and blocks[end].kind != HEADING:
        end += 1
    return end


def _counted(section: Section, run: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First block and the one behind the last of each counted list, with all that lies in its items."""
    blocks = section.blocks
    done = -1
    for n in run:
        if n < done or blocks[n].number is None:
            continue
        level, number, end = blocks[n].level, blocks[n].number, _end_of_item(section, n)
        while end in section.free:
            block = blocks[end]
            if block.kind != ITEM or block.level != level or block.number is None or block.number <= (number or 0):
                break
            number, end = block.number, _end_of_item(section, end)
        done = end
        yield n, end


def _prose_beside(section: Section, n: int, by: int) -> int | None:
    found = section.neighbour(n, by)
    if found is None or section.blocks[found].kind != PROSE:
        return None
    return found


def _is_caption(text: str) -> bool:
    return _caption(text) != text


def _caption(text: str) -> str:
    """What a caption says behind "Table 3:"."""
    first, _, rest = text.partition(" ")
    if first.lower() not in ("table", "tabelle") or not rest[:1].isdigit():
        return text
    told = rest.lstrip("0123456789.").lstrip(" :.–—-")
    return told or text


def _told_by(text: str) -> str:
    """How a paragraph names what comes next: its last sentence before a colon, else its first; cut where it is long.

    Nothing for one that says no more than "For example".
    """
    plain = " ".join(text[-_MOST_TOLD:].split()) if text.endswith(":") else " ".join(text[:_MOST_TOLD].split())
    sentences = re.split(r"(?<=[.!?])\s+(?=[^a-z])", plain.rstrip(":. "))
    told = [s for s in sentences if not patterns.SAYS_NOTHING.fullmatch(s.rstrip(".,"))]
    if not told:
        return ""
    found = (told[-1] if plain.endswith(":") else told[0]).rstrip(".")
    while len(found.split()) > _MOST_TOPIC_WORDS:
        shorter = max((found.rpartition(sign)[0] for sign in ("; ", ": ", ", ", " (", " – ", " — ")), key=len)
        if len(shorter.split()) < 3:
            return " ".join(found.split()[:_MOST_TOPIC_WORDS]) + " …"
        found = shorter
    return found


def is_too_short(section: Section, draft: Draft) -> bool:
    """Whether an answer has too few words to learn from."""
    text = sections.written(section.blocks[n] for n in draft.answer)[draft.cut :]
    return words(text) < LEAST_WORDS
