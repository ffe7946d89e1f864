"""How an item is asked for, in the document's language where that is known.

Law of this room: pure. A question names what the document names, and nothing
that stands in the answer alone. In a language without words here the topic by
itself is the question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """Sentences of one language; {topic} and {of} are filled in."""

    heading: str
    definition: str
    procedure: str
    principle: str
    principles: str
    code: str
    console: str
    """Of code that is typed at a prompt, with what it answers."""
    table: str
    of: str
    part: str
    how_to: tuple[str, str] = ("", "")
    """What a heading begins with, and what the question begins with instead."""


_ENGLISH = Words(
    heading='Explain "{topic}"{of}.',
    definition='What does "{topic}" mean?',
    procedure='What are the steps of "{topic}"{of}?',
    principle='Explain the principle "{topic}"{of}.',
    principles='Which principles are there for "{topic}"{of}?',
    code='Show the code for "{topic}"{of}, with its explanation.',
    console='Show "{topic}"{of} on the command line.',
    table='Show "{topic}"{of} as a table.',
    of=' in the context of "{above}"',
    part=" (part {number} of {count})",
    how_to=("how to ", "How do I "),
)
_GERMAN = Words(
    heading="Erkläre „{topic}“{of}.",
    definition="Was bedeutet „{topic}“?",
    procedure="Welche Schritte hat „{topic}“{of}?",
    principle="Erkläre den Grundsatz „{topic}“{of}.",
    principles="Welche Grundsätze gibt es für „{topic}“{of}?",
    code="Zeige den Code zu „{topic}“{of} und erkläre ihn.",
    console="Zeige „{topic}“{of} auf der Befehlszeile.",
    table="Zeige „{topic}“{of} als Tabelle.",
    of=" im Zusammenhang mit „{above}“",
    part=" (Teil {number} von {count})",
)
_BARE = Words(
    heading="{topic}{of}",
    definition="{topic}",
    procedure="{topic}{of}",
    principle="{topic}{of}",
    principles="{topic}{of}",
    code="{topic}{of}",
    console="{topic}{of}",
    table="{topic}{of}",
    of=" ({above})",
    part=" ({number}/{count})",
)
LANGUAGES: Mapping[str, Words] = {"en": _ENGLISH, "de": _GERMAN}


def of_language(language: str) -> Words:
    """The words for a language (ISO 639-1)."""
    return LANGUAGES.get(language, _BARE)


def ask(words: Words, rule: str, topic: str, above: str = "") -> str:
    """The question that an item answers. `rule` is a field of Words."""
    if is_question(topic):
        return topic
    begins, becomes = words.how_to
    if begins and rule in ("heading", "procedure") and topic.lower().startswith(begins):
        return becomes + re.sub(r"[.:]+$", "", topic[len(begins) :]) + "?"
    of = words.of.format(above=_quoted(above)) if above and above.lower() != topic.lower() else ""
    return str(getattr(words, rule)).format(topic=_quoted(topic), of=of)


def is_question(text: str) -> bool:
    """Whether a text asks."""
    return text.rstrip().endswith(("?", "？", "؟")) and any(map(str.isalpha, text))


def part(words: Words, question: str, number: int, count: int) -> str:
    """The question for one part of an answer."""
    if count == 1:
        return question
    told = words.part.format(number=number, count=count)
    return f"{question[:-1]}{told}." if question.endswith(".") else question + told


def _quoted(text: str) -> str:
    return text.strip().rstrip(".:").replace('"', "'")
