"""From a scientific paper to the examples that can be learnt of it.

Law of this room: pure. Every answer is text of the paper itself; nothing is
summarised, shortened or asked that its authors did not write. What of a paper
is not taken is told; all problems of a paper are found at once.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from services.datasets.forms import PAPER
from services.datasets.worker.forms import plain_metadata
from services.datasets.worker.found import ERROR, INFO, Problem, clip
from services.datasets.worker.plain import Plain, words
from services.datasets.worker.row import Row

PAIRS = ("abstract", "section", "summary")
FEW_WORDS = 15
LONG_CHARACTERS = 12_000
SHORT_BYTES = 500
"""Other fields of a paper stand with each of its examples up to this size, larger ones with the first alone."""
# Sections that say who, how paid and where, but nothing of what was found.
_FORMAL = re.compile(
    r"[\d. ]*(references|bibliography|literature cited|acknowledge?ments?|funding( information)?|"
    r"(authors?'? )?contributions?|author contributions|(conflicts?|declarations?) of interests?|"
    r"competing (financial )?interests?|data( and code)? availability( statement)?|code availability|"
    r"supplementary (data|information|materials?)|supporting information|abbreviations|ethics( statement)?|"
    r"ethical approval|consent for publication|publisher's note)[. ]*",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a paper."""

    examples: Sequence[Plain]
    problems: list[Problem]
    is_below: bool = False
    """Its score is below the one that was asked for; there are no examples then."""


def key_of(origin: Mapping[str, Any]) -> int:
    """What examples of one paper have in common."""
    told = f"{origin.get('file')}\0{origin.get('line')}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def is_of_paper(example: Plain) -> bool:
    """Whether an example of a sealed dataset was made of a paper."""
    metadata = example.get("metadata", {})
    return metadata.get("pair") in PAIRS and "title" in metadata and "line" in example.get("origin", {})


@dataclass(frozen=True, slots=True)
class _Section:
    place: str
    heading: str
    text: str


def read(given: Mapping[str, Any], columns: Mapping[str, str], min_score: float | None) -> Made:
    """The examples of a paper, in a fixed order; with an ERROR among the problems there are none."""
    row = Row(given, PAPER, columns)
    title, abstract = _text(row, "title").strip(), _text(row, "abstract")
    sections = _sections(row)
    score = _number(row, "quality_score")
    if score is None and min_score is not None and not row.problems_of(row.named("quality_score")):
        row.missing(row.named("quality_score"), "a number, since min_score asks for it")
    about: dict[str, Any] = {"title": title, "authors": _authors(row), "year": _year(row)}
    about |= {"doi": row.text("doi", needed=False), "quality_score": score}
    if any(p.severity == ERROR for p in row.problems):
        return Made((), row.problems)
    if score is not None and min_score is not None and score < min_score:
        return Made((), [], True)
    told = {key: value for key, value in about.items() if value not in (None, "", [])}
    for key in ("pair", "section", *told):
        if key in row.rest:
            row.wrong("twin_key", f"examples of papers have metadata of the name {clip(key)}", "rename the field", key)
    kept = []
    for section in sections:
        problem = _idle(section)
        if problem is None:
            kept.append(section)
        else:
            row.problems.append(problem)
    examples = [_example(f"Write the abstract of the paper “{title}”.", "", abstract, told, {"pair": "abstract"})]
    for section in kept:
        asked = f"Write the section “{section.heading}” of the paper “{title}”."
        examples.append(_example(asked, "", section.text, told, {"pair": "section", "section": section.heading}))
    body = "\n\n".join(f"{s.heading}\n\n{s.text}" for s in kept)
    if len(body) > LONG_CHARACTERS:
        told_so = f"its sections have {len(body)} characters, so no summary is asked of them"
        hint = f"{LONG_CHARACTERS} or fewer become one example more"
        row.problems.append(Problem("long_paper", told_so, hint, row.named("sections"), INFO))
    elif len(kept) > 1:
        asked = f"Summarise the paper “{title}” as its abstract."
        examples.append(_example(asked, body, abstract, told, {"pair": "summary"}))
    rest = plain_metadata(row.rest, row.problems)
    short = {key: value for key, value in rest.items() if len(orjson.dumps(value)) <= SHORT_BYTES}
    for i, example in enumerate(examples):
        example["metadata"] = {**(short if i else rest), **example["metadata"]}
    return Made(examples, row.problems)


def _example(asked: str, given: str, answer: str, told: Mapping[str, Any], more: Mapping[str, Any]) -> Plain:
    # Two parts, as the instruction form has them, so that an export finds both again.
    parts = [{"text": asked}, {"text": f"\n\n{given}"}] if given else [{"text": asked}]
    turns = [{"role": "ROLE_USER", "parts": parts}, {"role": "ROLE_ASSISTANT", "parts": [{"text": answer}]}]
    return {"chat": {"messages": turns}, "metadata": {**told, **more}}


def _text(row: Row, field: str) -> str:
    """A text that says something."""
    column = row.named(field)
    text = row.text(field)
    if not text.strip() and not row.problems_of(column):
        row.wrong("missing_field", "the paper form needs it; it is empty", "a text", column)
    return text


def _sections(row: Row) -> list[_Section]:
    column = row.named("sections")
    value = row.take("sections")
    found = []
    listed = None if value is None else row.listed(value, column, "a list of {heading, text}")
    for i, given in enumerate(listed or ()):
        place = f"{column}[{i}]"
        if not isinstance(given, dict):
            row.wrong("wrong_type", f"is {clip(given)}", '{"heading": …, "text": …}', place)
            continue
        texts = {}
        for name in ("heading", "text"):
            text = given.get(name)
            if not isinstance(text, str) or not text.strip():
                where = f"{place}.{name}"
                if text is None or isinstance(text, str):
                    told = "is empty" if text else "is missing"
                    row.wrong("missing_field", f"a section needs it; it {told}", "a text", where)
                else:
                    row.wrong("wrong_type", f"is {clip(text)}", "a text", where)
            else:
                texts[name] = text
        for name, value in given.items():
            if name not in ("heading", "text"):
                row.keep(f"{place}.", name, value)
        if len(texts) == 2:
            found.append(_Section(place, texts["heading"].strip(), texts["text"]))
    return found


def _authors(row: Row) -> list[str]:
    column = row.named("authors")
    value = row.take("authors")
    names = []
    listed = None if value is None else row.listed(value, column, "a list of names")
    for i, given in enumerate(listed or ()):
        name = given.get("name") if isinstance(given, dict) and given.keys() == {"name"} else given
        if isinstance(name, str):
            names.append(name)
        else:
            row.wrong("wrong_type", f"is {clip(given)}", "a name", f"{column}[{i}]")
    return names


def _number(row: Row, field: str) -> float | None:
    """A number, or the text of one as CSV fields hold it; None where there is none."""
    column, value = row.named(field), row.take(field)
    if isinstance(value, str) and value.strip():
        try:
            value = float(value)
        except ValueError:
            row.wrong("wrong_type", f"is {clip(value)}", "a number", column)
            return None
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        row.wrong("wrong_type", f"is {clip(value)}", "a number", column)
        return None
    return value


def _year(row: Row) -> int | None:
    column = row.named("year")
    year = _number(row, "year")
    if year is None or (year == int(year) and 1000 <= year <= 9999):
        return None if year is None else int(year)
    row.wrong("wrong_type", f"is {clip(year)}", "a year of four digits", column)
    return None


def _idle(section: _Section) -> Problem | None:
    """Why a section teaches nothing."""
    if _FORMAL.fullmatch(section.heading):
        told = f"{clip(section.heading)} says nothing of what was found"
    elif words(section.text) < FEW_WORDS:
        told = f"{clip(section.heading)} has fewer than {FEW_WORDS} words"
    else:
        return None
    return Problem("section_left_out", told, "no example is made of it", section.place, INFO)
