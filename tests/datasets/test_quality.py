"""The score says how it was made, and no fault raises it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.datasets.worker import short
from services.datasets.worker.plain import Plain
from services.datasets.worker.quality import FULL_AT, PRIVATE, TEXTS, TURNS, WEIGHTS, Figures, score
from services.datasets.worker.rules import FEW_ROWS, SHORT_OUTPUT_WORDS
from tests.datasets.kit import Door, jsonl
from tests.datasets.spooled import answered, spooled, text
from tests.house import ROOT

RULES = (*PRIVATE, *TEXTS, *TURNS)
PERFECT = Figures(read=1000, skipped=0, repeated=0, near=0, kept=1000, words=1000 * SHORT_OUTPUT_WORDS, findings={})


@st.composite
def figures(draw: st.DrawFn) -> Figures:
    read = draw(st.integers(0, 2000))
    skipped = draw(st.integers(0, read))
    repeated = draw(st.integers(0, read - skipped))
    return Figures(
        read=read,
        skipped=skipped,
        repeated=repeated,
        near=draw(st.none() | st.integers(0, read - skipped)),
        kept=read - skipped - repeated,
        words=draw(st.integers(0, 100_000)),
        findings=draw(st.dictionaries(st.sampled_from(RULES), st.integers(0, 3000))),
    )


def parts(f: Figures) -> dict[str, float]:
    return {p.name: p.score for p in score(f).parts}


@given(figures())
@settings(max_examples=100)
def test_the_score_is_the_weighted_mean_of_parts_that_are_told(f: Figures) -> None:
    made = score(f)
    names = [p.name for p in made.parts]
    assert names == [n for n in WEIGHTS if n != "near_duplicates" or f.near is not None]
    assert sum(p.weight for p in made.parts) == pytest.approx(1)
    assert made.score == pytest.approx(sum(p.score * p.weight for p in made.parts), abs=0.11)
    assert 0 <= made.score <= 100 and all(0 <= p.score <= 100 and p.told for p in made.parts)
    if not f.kept:
        assert made.score == 0 and not any(p.score for p in made.parts)


@given(figures(), st.sampled_from(("skipped", "repeated", "near", "words", *RULES)), st.integers(1, 500))
@settings(max_examples=150)
def test_a_fault_more_raises_no_part(f: Figures, fault: str, count: int) -> None:
    if fault in RULES:
        worse = dataclasses.replace(f, findings={**f.findings, fault: f.findings.get(fault, 0) + count})
    elif fault == "words":
        worse = dataclasses.replace(f, words=max(0, f.words - count))
    elif fault == "near":
        worse = dataclasses.replace(f, near=None if f.near is None else f.near + count)
    else:  # a row with an error, or a twin, beside the rows that there are
        read = {"read": f.read + count, fault: getattr(f, fault) + count}
        worse = dataclasses.replace(f, **read)
        before, after = parts(f), parts(worse)
        own = {"skipped": "valid_rows", "repeated": "unique_rows"}[fault]
        assert after[own] <= before[own] + 1e-9
        return
    before, after = parts(f), parts(worse)
    assert all(after[n] <= before[n] + 1e-9 for n in before) and score(worse).score <= score(f).score


def test_a_perfect_dataset_has_full_marks_and_every_part_reaches_nothing() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1) and score(PERFECT).score == 100
    worst = {
        "valid_rows": {"skipped": 250},
        "unique_rows": {"repeated": 500},
        "near_duplicates": {"near": 500},
        "size": {"kept": 0},
        "output_length": {"words": 0},
        "private_data": {"findings": {"secret": 60, "personal_data": 40}},
        "texts": {"findings": {"mojibake": 125, "short_output": 125}},
        "turns": {"findings": {"empty_turn": 250}},
    }
    assert set(worst) == set(WEIGHTS)
    for name, faults in worst.items():
        assert parts(dataclasses.replace(PERFECT, **faults))[name] == 0, name  # type: ignore[arg-type]
    half = parts(dataclasses.replace(PERFECT, kept=FEW_ROWS // 2, words=FEW_ROWS // 2 * SHORT_OUTPUT_WORDS // 2))
    assert half["size"] == half["output_length"] == 50


def test_rows_that_nobody_compared_change_no_proportion() -> None:
    made = score(dataclasses.replace(PERFECT, near=None))
    assert made.score == 100
    weights = {p.name: p.weight for p in made.parts}
    assert weights["valid_rows"] / weights["size"] == pytest.approx(WEIGHTS["valid_rows"] / WEIGHTS["size"])


def test_the_page_tells_weights_and_shares() -> None:
    told = re.findall(r"^\| `(\w+)` \| (\d+) % \|.*\| (\d+ %|—) \|$", (ROOT / "docs" / "quality.md").read_text(), re.M)
    known = [
        (name, f"{weight * 100:.0f}", f"{FULL_AT[name] * 100:.0f} %" if name in FULL_AT else "—")
        for name, weight in WEIGHTS.items()
    ]
    assert told == known


# Short outputs

LONG = "word " * 30


def short_ones(rows: list[Plain], keep: list[bool] | None = None) -> list[int]:
    with spooled(rows) as (spool, _):
        places, problem = short.outputs(spool, np.array(keep or [True] * len(rows), bool))
    assert problem.rule == "short_output"
    return [int(p) for p in places]


def test_a_lost_output_among_long_ones_is_told() -> None:
    rows: list[Plain] = [answered(f"ask {i}", LONG) for i in range(40)]
    rows[7] = answered("ask", "Yes.")
    assert short_ones(rows) == [7]
    rows[9] = text("ok")
    assert short_ones(rows) == [7, 9]
    assert short_ones(rows, [i != 7 for i in range(40)]) == [9]


@pytest.mark.parametrize(
    "row",
    [
        answered("ask", "one two three"),
        answered("ask", "我们今天一起去公园散步然后喝茶聊天"),
        text("Donaudampfschifffahrtsgesellschaft"),
        {"chat": {"messages": [{"role": "ROLE_ASSISTANT", "tool_calls": [{"name": "f", "arguments_json": "{}"}]}]}},
    ],
    ids=["three words", "no blanks", "one long word", "a call"],
)
def test_an_output_with_something_to_say_is_not_short(row: Plain) -> None:
    assert short_ones([*(answered(f"ask {i}", LONG) for i in range(40)), row]) == []


def test_a_dataset_of_short_answers_has_no_short_output() -> None:
    assert short_ones([answered(f"ask {i}", "Yes.") for i in range(40)]) == []
    some = [answered(f"ask {i}", "Yes." if i % 10 == 0 else LONG) for i in range(40)]  # 10 %: it is how the rows are
    assert short_ones(some) == [] and short_ones([]) == []


def test_the_score_through_the_door(door: Door) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"{LONG}{i}"} for i in range(60)]
    rows[3] = {"instruction": "Say.", "output": "No."}
    rows[5]["output"] = rows[5]["output"].replace("word", "cafÃ©", 1)
    rows.append(rows[0])
    made = door.make("scored", jsonl(rows))
    assert made.stats.findings["short_output"] == made.stats.findings["mojibake"] == 1
    told = {p.name: p for p in made.stats.quality.parts}
    assert list(told) == [n for n in WEIGHTS if n != "near_duplicates"]
    assert told["unique_rows"].told == "1 of 61 rows repeat an earlier one"
    assert told["texts"].told.startswith("2 findings") and told["size"].score == 12
    mean = sum(p.score * p.weight for p in told.values())
    assert made.stats.quality.score == pytest.approx(mean, abs=0.11)
    (lost,) = [f for f in door.findings("datasets/scored") if f.rule == "short_output"]
    assert lost.line == 4 and "fewer than 3 words" in lost.message
