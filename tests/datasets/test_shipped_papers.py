"""The shipped papers: said to be invented, with marked genes, and some below a score that a reader may ask for."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from services.datasets.worker.steps.genes import GENES
from tests.datasets.shipped import LICENCE, SHELF, TOLD, alike, validated
from tests.datasets.spooled import answered

NAME = "genomics-papers.json"
FIELDS = ["title", "abstract", "sections", "authors", "year", "quality_score", "genes", "note", "license"]
MARKED = re.compile(r"\*([^*\s]+)\*")
ASKED_SCORE = 0.5
HEADINGS = [
    "Question", "Genes", "Model", "Settings", "Methods", "Results", "Checks", "Limits", "Next steps", "In plain words",
    "Terms",
]  # fmt: skip


def papers() -> list[dict[str, Any]]:
    return list(json.loads((SHELF / NAME).read_text()))


def text_of(paper: dict[str, Any]) -> str:
    return "\n".join([paper["title"], paper["abstract"], *(section["text"] for section in paper["sections"])])


def test_there_are_20_papers_said_to_be_invented_by_nobody() -> None:
    found = papers()
    assert len(found) == len({paper["title"] for paper in found}) == 20
    for paper in found:
        assert list(paper) == FIELDS and paper["license"] == LICENCE
        assert paper["authors"] == ["qlorad examples"]
        assert paper["note"] == "Invented for demonstration; no such study was made."
        assert 50 <= len(paper["abstract"].split()) <= 100
        assert [s["heading"] for s in paper["sections"]] in (HEADINGS, ["Methods"], [])
        assert all(len(s["text"].split()) >= 20 for s in paper["sections"])


def test_some_are_below_a_score_and_they_are_the_thin_ones() -> None:
    scores = [paper["quality_score"] for paper in papers()]
    assert all(0 < score < 1 for score in scores)
    below = [paper for paper in papers() if paper["quality_score"] < ASKED_SCORE]
    assert len(below) == 5 and all(len(paper["sections"]) < 2 for paper in below)


def test_every_gene_is_marked_wherever_it_stands_and_is_known_for_one() -> None:
    for paper in papers():
        text = text_of(paper)
        marked = set(MARKED.findall(text))
        assert marked and sorted(marked) == paper["genes"]
        assert text.count("*") == 2 * len(MARKED.findall(text))
        for gene in marked:
            assert GENES.fullmatch(gene), gene
            assert not re.search(rf"(?<![*\w]){re.escape(gene)}(?![*\w])", text), (gene, paper["title"])


def test_papers_share_an_order_and_no_filling() -> None:
    full = [paper for paper in papers() if len(paper["sections"]) > 1]
    assert len(full) == 15
    found: Counter[str] = Counter()
    for paper in full:
        named = [line.partition(":")[0] for line in paper["abstract"].split("\n")]
        assert named == ["Aim", "Method", "Finding", "Meaning"], paper["title"]
        lines = [line for section in paper["sections"] for line in re.split(r"\n|(?<=[.]) ", section["text"])]
        assert len(lines) >= 40
        found.update(set(lines))
    assert max(found.values()) <= 2 and sum(count > 1 for count in found.values()) <= 5


def test_no_two_papers_are_nearly_equal() -> None:
    assert alike([answered(paper["title"], text_of(paper)) for paper in papers()], 0.5) == []
    assert alike([answered("abstract", paper["abstract"]) for paper in papers()], 0.5) == []


def test_the_worker_makes_examples_of_them_and_leaves_out_what_is_below_a_score() -> None:
    sections = [len(paper["sections"]) for paper in papers()]
    done, findings = validated(SHELF / NAME)
    # For each paper its abstract and its sections, and a summary where there are several sections.
    assert done.stats.rows["train"] == 20 + sum(sections) + sum(count > 1 for count in sections) == 20 + 169 + 15
    assert set(findings) <= TOLD, findings
    done, findings = validated(SHELF / NAME, min_score=ASKED_SCORE)
    assert done.stats.rows["train"] == 15 * (1 + 11 + 1) and done.stats.below_score_papers == 5
    assert set(findings) <= TOLD, findings
