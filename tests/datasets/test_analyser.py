"""The analyser: what it finds, that it loses nothing, and that it says the same each time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.datasets.worker.documents import kinds
from services.datasets.worker.documents.analyse import Found, analyse, texts
from services.datasets.worker.documents.blocks import (
    CODE,
    HEADING,
    ITEM,
    LINE,
    MEANING,
    PROSE,
    TABLE,
    TERM,
    Block,
    Document,
    Span,
    table_text,
)
from services.datasets.worker.documents.left import REASONS, findings

WORD = st.sampled_from(
    "probe water rain zero gauge river drift means is a the: Q: A: Table 1: must 3. how ? . “x” `y`".split()
)
SAID = st.lists(WORD, min_size=0, max_size=24).map(" ".join)
KINDS = st.sampled_from([HEADING, PROSE, PROSE, ITEM, ITEM, CODE, TABLE, TERM, MEANING])


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Any blocks at all, each on lines of its own."""
    blocks, line = [], 1
    for n in range(draw(st.integers(1, 30))):
        kind, text = draw(KINDS), draw(SAID) or f"w{n}"
        cells = (("a", text), ("b", "c")) if kind == TABLE else ()
        number = draw(st.one_of(st.none(), st.integers(1, 4))) if kind == ITEM else None
        level = draw(
            st.integers(1, 4) if kind == HEADING else st.integers(0, 2) if kind in (ITEM, PROSE) else st.just(0)
        )
        left = draw(st.sampled_from(["", "", "", "", "", "picture"])) if kind == PROSE else ""
        height = draw(st.integers(1, 3))
        span = Span(LINE, line, line + height - 1, line * 100, (line + height) * 100)
        lead = draw(st.sampled_from(["", text.split()[0]]))
        shown = table_text(cells) if cells else text
        blocks.append(Block(kind, shown, span, level, number, "", lead, cells, left))
        line += height
    return Document("markdown", blocks, draw(st.sampled_from(["", "Guide"])))


def placed(document: Document, found: Found) -> None:
    """Every block is in an item, asks for one, names what stands below it, or is left out with a reason; once."""
    held = Counter(n for item in found.items for n in item.blocks)
    assert max(held.values(), default=1) == 1 and not set(held) & set(found.left)
    for n, block in enumerate(document.blocks):
        if block.kind != HEADING:
            assert (n in held) != (n in found.left), block
    assert set(found.left.values()) <= set(REASONS)
    last = document.blocks[-1].span.last
    for item in found.items:
        assert item.answer.strip() and item.spans
        assert all(1 <= s.first <= s.last <= last and s.begin < s.end for s in item.spans)
        # Lines of an item are those of its blocks, and no others.
        lines = {m for s in item.spans for m in range(s.first, s.last + 1)}
        spans = [document.blocks[n].span for n in item.blocks]
        assert lines == {m for s in spans for m in range(s.first, s.last + 1)}
        for n in item.blocks:
            assert (
                item.rule == "question"
                or document.blocks[n].text in item.answer
                or is_shown(document.blocks[n], item.answer)
            )


def is_shown(block: Block, answer: str) -> bool:
    """Whether a block's words stand in an answer, line by line."""
    return block.kind == TERM or all(line.strip() in answer for line in block.text.split("\n"))


@settings(max_examples=60, deadline=None)
@given(documents())
def test_no_block_is_lost_and_no_span_is_outside(document: Document) -> None:
    found = analyse(document, "en")
    placed(document, found)
    assert found == analyse(document, "en")
    told = findings(document.blocks, found.left)
    assert {problem.rule for _, problem in told} == set(found.left.values())
    whole = texts(document)
    placed(document, whole)
    assert {item.rule for item in whole.items} <= {"text"}


TEXT = """# Guide

## Glossary

Blank: a sample without what is looked for in it.

## Method

A run is defined as all samples between two checks.

Q: How long does it take to settle?

A: About two hours in the cold room.

By drift we mean the slow change of the zero.

### Principles

- Write it when you see it. A memory rounds.
- Never clean the record. A line through it is enough.

### Cleaning

1. Rinse it with water.
2. Dry it in the air.

Then wait.

### How to read the gauge

Look at it from straight ahead, with one eye closed.

### Why is the door shut?

Because the cat eats the samples.

### Contents

- [Method](#method)

## References

Somebody: A book. A town, a year.

## Empty
"""


def rows(text: str, language: str = "en") -> dict[str, tuple[str, str]]:
    found = analyse(kinds.read(text.encode(), "a.md"), language)
    return {item.question: (item.rule, item.answer) for item in found.items}


def test_each_rule_finds_its_own() -> None:
    document = kinds.read(TEXT.encode(), "a.md")
    found = analyse(document, "en")
    told = [(item.rule, item.question) for item in found.items]
    assert told == [
        ("definition", 'What does "Blank" mean?'),
        ("definition", 'What does "run" mean?'),
        ("question", "How long does it take to settle?"),
        ("definition", 'What does "drift" mean?'),
        ("principle", 'Explain the principle "Write it when you see it".'),
        ("principle", 'Explain the principle "Never clean the record".'),
        ("procedure", 'What are the steps of "Cleaning" in the context of "Method"?'),
        ("heading", "How do I read the gauge?"),
        ("question", "Why is the door shut?"),
    ]
    assert found.items[2].answer == "About two hours in the cold room."
    assert found.items[6].answer == "1. Rinse it with water.\n2. Dry it in the air.\n\nThen wait."
    assert Counter(found.left.values()) == {"table_of_contents": 1, "links_only": 1, "references": 2, "lone_heading": 1}


@pytest.mark.parametrize(
    "said",
    [
        "This means that the probe has to be rinsed again today.",
        "It is defined as whatever they want it to be today.",
        "Note: the probe has to be rinsed again every single day.",
        "Whoever walks by means well and knows nothing of it.",
    ],
)
def test_what_only_looks_like_a_definition_is_none(said: str) -> None:
    assert [rule for rule, _ in rows(f"# Guide\n\n## Method\n\n{said}\n").values()] == ["heading"]


def test_another_language_is_asked_in_its_own_words_or_by_the_topic_alone() -> None:
    text = "# Messen\n\n## Regen\n\nDer Regen wird jeden Morgen um sieben Uhr gemessen und sofort notiert.\n"
    assert list(rows(text, "de")) == ["Erkläre „Regen“ im Zusammenhang mit „Messen“."]
    assert list(rows(text, "it")) == ["Regen (Messen)"]


def test_long_sections_are_cut_between_blocks_and_say_so() -> None:
    part = "The river rises in spring and falls in summer, as it always did. " * 60
    told = rows(f"# G\n\n## River\n\n{part}\n\n{part}\n\n{part}\n")
    assert list(told) == [f'Explain "River" in the context of "G" (part {n} of 3).' for n in (1, 2, 3)]


def test_code_and_tables_take_the_prose_beside_them() -> None:
    text = "# G\n\n## Zero\n\nThis sets the zero:\n\n```python\nzero()\n```\n\nIt takes a second.\n\n"
    text += "Table 2: Signs of the lamp\n\n| sign | meaning |\n|---|---|\n| red | stop |\n"
    told = rows(text)
    assert told['Show the code for "Zero" in the context of "G", with its explanation.'] == (
        "code",
        "This sets the zero:\n\n```python\nzero()\n```\n\nIt takes a second.",
    )
    table = told['Show "Signs of the lamp" in the context of "Zero" as a table.']
    assert table[1].startswith("Table 2: Signs of the lamp\n\n| sign | meaning |")
    alone = analyse(kinds.read(b"```\nx = 1\n```\n", "a.md"), "en")
    assert not alone.items and alone.left == {0: "code_without_prose"}


def test_few_words_beside_items_lead_to_them_or_go_with_them() -> None:
    text = "# G\n\n## Terms\n\nThese words are used here.\n\n- **Blank**: a sample without what is looked for.\n"
    found = analyse(kinds.read(text.encode(), "a.md"), "en")
    assert [item.rule for item in found.items] == ["definition"] and set(found.left.values()) == {"lead_in"}


@given(documents())
@settings(max_examples=60, deadline=None)
def test_one_question_has_one_answer(document: Document) -> None:
    answers: dict[str, set[str]] = {}
    for item in analyse(document, "en").items:
        answers.setdefault(item.question, set()).add(item.answer)
    assert {q: a for q, a in answers.items() if len(a) > 1} == {}
    assert [q for q in answers if '""' in q] == []


def asked(text: str) -> list[tuple[str, str]]:
    return [(i.question, i.answer) for i in analyse(kinds.read(text.encode(), "a.md"), "en").items]


def test_what_asks_the_same_and_answers_otherwise_is_counted() -> None:
    text = "# Guide\n\n## Runs\n\n" + "".join(f"The base says:\n\n```\n{c} = 1\n```\n\n" for c in "abc")
    assert [q for q, _ in asked(text)] == [
        'Show the code for "Runs" in the context of "Guide", with its explanation.',
        'Show the code for "Runs: The base says" in the context of "Guide", with its explanation (part 1 of 2).',
        'Show the code for "Runs: The base says" in the context of "Guide", with its explanation (part 2 of 2).',
    ]


def test_paragraphs_with_headings_of_their_own_are_items_of_their_own() -> None:
    text = "# Security\n\nWhat is held, and by whom, stands here.\n\n"
    text += "**Tokens.** They are kept as hashes, and never themselves.\n\n"
    text += (
        "- a list of them\n- stands in a file\n\n**Names**: they are read once, and checked before they are paths.\n\n"
    )
    text += "A *word* in it is no heading, and neither is what *ends* so.\n"
    assert asked(text) == [
        ('Explain "Security".', "What is held, and by whom, stands here."),
        (
            'Explain "Tokens" in the context of "Security".',
            "Tokens. They are kept as hashes, and never themselves.\n\n- a list of them\n- stands in a file",
        ),
        (
            'Explain "Names" in the context of "Security".',
            "Names: they are read once, and checked before they are paths.\n\n"
            "A word in it is no heading, and neither is what ends so.",
        ),
    ]


def test_code_is_asked_for_by_what_is_said_of_it() -> None:
    def of(prose: str, code: str = "x = 1") -> str:
        return asked(f"# A\n\n```\nfirst = 0\n```\n\n{prose}\n\n```\n{code}\n```\n")[-1][0].partition(' "A: ')[2]

    assert of("Your rows are named. What is broken has its line.").startswith('Your rows are named",')
    assert of("Much was said. It is done so:").startswith('It is done so",')
    assert of("Made in a while. (There is another way too.)").startswith('Made in a while",')
    long = "The token is kept as a hash, which nobody can turn back, so that whoever reads the file knows nothing of it"
    assert of(long).startswith('The token is kept as a hash, which nobody can turn back",')
    assert of("The lines are ordered by weight. For example:").startswith('The lines are ordered by weight",')
    assert of("For example:").startswith('x = 1",') and of("Here is one for example:").startswith("Here is one")
    assert of("x " * 40).startswith('x x x x x x x x x x x x x x x …",')
    (*_, (question, answer)) = asked("# A\n\nSee what it says:\n\n```\n$ qlorad status\n```\n\n```\nSERVING\n```\n")
    assert question == 'Show "A" on the command line.' and answer.endswith(
        "```\n$ qlorad status\n```\n\n```\nSERVING\n```"
    )


def test_tables_are_told_apart_by_the_names_of_their_columns() -> None:
    table = "| rows | 1 | 2 |\n|---|---|---|\n| a | 3 | 4 |\n\n"
    questions = [q for q, _ in asked(f"# Figures\n\n{table}Between them.\n\n{table.replace('rows', 'tokens')}")]
    assert [q for q in questions if "as a table" in q] == [
        'Show "Figures: rows" as a table.',
        'Show "Figures: tokens" as a table.',
    ]


def test_a_signature_with_a_word_for_terms_is_no_glossary() -> None:
    text = "# parse (file, definitions)\n\nfile: the path of the file that holds the declarations.\n\n"
    text += "Returns: zero where the file is as it should be.\n"
    assert [q for q, _ in asked(text)] == ['Explain "parse (file, definitions)".']
    assert [q for q, _ in asked(text.replace("parse (file, definitions)", "Definitions"))] == [
        'What does "file" mean?',
        'What does "Returns" mean?',
    ]


def test_what_nothing_names_is_not_asked_for() -> None:
    steps, table = (
        "1. Rinse the probe well.\n2. Dry the probe well.\n\n",
        "| sign | meaning |\n|---|---|\n| red | stop |\n\n",
    )
    assert asked(steps) == []
    assert [q for q, _ in asked(f"This is how it is cleaned:\n\n{steps}{table}")] == [
        'What are the steps of "This is how it is cleaned"?',
        'Show "sign, meaning" as a table.',
    ]


def test_a_list_of_contents_is_above_nothing() -> None:
    page = "<title>Gauges</title><h2>Table of contents</h2><ul><li>Reading it<li>Rinsing it</ul>"
    page += (
        "<h3>Reading it</h3><p>It is read at seven every day.<h3>Rinsing it</h3><p>It is rinsed with rain every day."
    )
    found = analyse(kinds.read(page.encode(), "a.html"), "en")
    assert [(i.question, i.section) for i in found.items] == [
        ('Explain "Reading it" in the context of "Gauges".', "Reading it"),
        ('Explain "Rinsing it" in the context of "Gauges".', "Rinsing it"),
    ]
    assert list(found.left.values()) == ["table_of_contents"] * 3
