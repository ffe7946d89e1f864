"""The shipped principles: each says why, shows it where it can be shown, and says when not to follow it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import Any

from tests.datasets.shipped import LICENCE, SHELF, TOLD, alike, rows, validated
from tests.datasets.spooled import answered

NAME = "coding-principles.jsonl"
FIELDS = ["instruction", "input", "output", "principle", "topic", "license"]
ANSWER = re.compile(
    r"([^.?!\n]+)\. ([^\n]+)\n\n"
    r"(?:Instead of this:\n\n```python\n(.*?)```\n\nwrite this:\n\n```python\n(.*?)```\n\n)?"
    r"You see it broken when ([^\n]+)\.\n\n"
    r"When not to: ([^\n]+)",
    re.DOTALL,
)


def parts(row: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    """Principle, reasons, code before and after ("" where there is none), its sign, and when not to follow it."""
    match = ANSWER.fullmatch(row["output"])
    assert match, row["principle"]
    principle, why, before, after, sign, limits = match.groups(default="")
    return principle, why, before, after, sign, limits


def test_there_are_100_rows_and_each_is_whole() -> None:
    found = rows(NAME)
    assert len(found) == 100
    for row in found:
        assert list(row) == FIELDS and row["license"] == LICENCE and row["input"] == ""
        assert row["instruction"].endswith("?")
        principle, why, _, _, sign, limits = parts(row)
        assert principle == row["principle"]
        assert len(why.split()) >= 45 and len(sign.split()) >= 6 and len(limits.split()) >= 12, principle
    assert len({row["instruction"] for row in found}) == len({row["principle"] for row in found}) == 100
    topics = Counter(row["topic"] for row in found)
    assert len(topics) >= 10 and max(topics.values()) <= 15


def test_code_before_and_after_compiles_and_differs() -> None:
    shown = [(before, after) for _, _, before, after, _, _ in map(parts, rows(NAME)) if before]
    assert len(shown) >= 40
    for before, after in shown:
        assert before != after and ast.parse(before).body and ast.parse(after).body


def test_no_two_rows_are_nearly_equal_with_or_without_the_question() -> None:
    found = rows(NAME)
    assert alike([answered(row["instruction"], row["output"]) for row in found]) == []
    assert alike([answered("why", parts(row)[1]) for row in found], 0.5) == []
    assert alike([answered("sign", parts(row)[4]) for row in found], 0.5) == []
    assert alike([answered("when not", parts(row)[5]) for row in found], 0.5) == []
    twin = answered(found[3]["instruction"], found[3]["output"].replace("The reader", "A reader"))
    assert alike([answered(row["instruction"], row["output"]) for row in found] + [twin]) == [(100, 3)]


def test_the_worker_finds_no_fault() -> None:
    done, findings = validated(SHELF / NAME)
    assert done.stats.rows["train"] == 100 and done.stats.skipped_rows == done.stats.duplicate_rows == 0
    assert set(findings) <= TOLD, findings
