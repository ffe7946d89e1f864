"""Scientific papers: what is made of one, what is left out of it, and what is wrong with it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.datasets.forms import COMPLETION, PAPER
from services.datasets.worker import grouping, papers
from services.datasets.worker.found import ERROR, INFO
from services.datasets.worker.plain import text_of
from services.datasets.worker.sniff import form_of, sniff
from services.datasets.worker.spool import Segment, Spool
from tests.datasets.kit import Door, jsonl, refusal

FORMAL = {"heading": "5. Acknowledgements", "text": "We thank everybody who fed the cells in the nights. " * 3}


def words(kind: str, number: int, count: int) -> str:
    """Words that no other paper has."""
    return " ".join(f"{kind}{number}x{i}" for i in range(count))


def paper(number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "title": f"Growth of line {number}",
        "abstract": words("abstract", number, 20),
        "sections": [
            {"heading": "Methods", "text": words("method", number, 30)},
            {"heading": "Results", "text": words("result", number, 30)},
            FORMAL,
        ],
        "authors": ["A. Weber", {"name": "B. Lind"}],
        "quality_score": 0.8,
        "year": 2021,
        "doi": "10.1000/x",
        **more,
    }


def said(example: dict[str, Any]) -> tuple[str, str]:
    asked, answer = example["chat"]["messages"]
    return text_of(asked), text_of(answer)


def test_every_answer_is_text_of_the_paper() -> None:
    given_ = paper(7, venue="Notes")
    made = papers.read(given_, {}, None)
    assert [e["metadata"]["pair"] for e in made.examples] == ["abstract", "section", "section", "summary"]
    whole = [given_["abstract"], *(s["text"] for s in given_["sections"][:2]), given_["abstract"]]
    assert [said(e)[1] for e in made.examples] == whole
    assert said(made.examples[0])[0] == "Write the abstract of the paper “Growth of line 7”."
    assert said(made.examples[2])[0] == "Write the section “Results” of the paper “Growth of line 7”."
    asked = said(made.examples[3])[0]
    assert words("method", 7, 30) in asked and words("result", 7, 30) in asked and "We thank" not in asked
    told = {"title": "Growth of line 7", "authors": ["A. Weber", "B. Lind"], "year": 2021, "doi": "10.1000/x",
            "quality_score": 0.8, "venue": "Notes"}  # fmt: skip
    assert made.examples[0]["metadata"] == {**told, "pair": "abstract"}
    assert made.examples[2]["metadata"] == {**told, "pair": "section", "section": "Results"}
    assert [(p.rule, p.field, p.severity) for p in made.problems] == [("section_left_out", "sections[2]", INFO)]


def test_other_fields_are_kept_and_large_ones_once() -> None:
    made = papers.read(paper(venue="Notes", full=words("full", 1, 200), n=2**60), {}, None)
    assert [sorted(e["metadata"].keys() & {"venue", "full", "n"}) for e in made.examples] == [
        ["full", "n", "venue"], *[["n", "venue"]] * 3
    ]  # fmt: skip
    assert "number_as_text" in {p.rule for p in made.problems}
    blank = papers.read(paper(abstract=" Of cells. ", title=" T "), {}, None).examples[0]
    assert said(blank) == ("Write the abstract of the paper “T”.", " Of cells. ")


def test_what_is_not_asked_is_told() -> None:
    short = {"heading": "Outlook", "text": "More days."}
    long = {"heading": "Appendix", "text": "word " * 3000}
    made = papers.read(paper(sections=[*paper()["sections"][:2], short, long]), {}, None)
    assert [(p.rule, p.field) for p in made.problems] == [
        ("section_left_out", "sections[2]"),
        ("long_paper", "sections"),
    ]
    assert [e["metadata"]["pair"] for e in made.examples] == ["abstract", "section", "section", "section"]
    for bare in (paper(sections=[]), paper(sections=None), {"title": "T", "abstract": "Of cells."}):
        assert [e["metadata"]["pair"] for e in papers.read(bare, {}, None).examples] == ["abstract"]


@pytest.mark.parametrize(("score", "is_below"), [(0.5, False), (0.49, True), ("0.7", False), (-1, True), (3, False)])
def test_the_score_decides(score: Any, is_below: bool) -> None:
    made = papers.read(paper(quality_score=score), {}, 0.5)
    assert made.is_below == is_below and bool(made.examples) == (not is_below)
    assert papers.read(paper(quality_score=score), {}, None).examples


def test_everything_wrong_is_found_at_once() -> None:
    broken = {
        "abstract": "  ",
        "sections": [{"heading": "Methods"}, "text", {"heading": 3, "text": ""}],
        "authors": ["A", 5],
        "quality_score": "high",
        "year": 21,
        "doi": 7,
    }
    made = papers.read(broken, {}, 0.5)
    assert not made.examples and not made.is_below and {p.severity for p in made.problems} == {ERROR}
    assert sorted((p.field, p.rule) for p in made.problems) == [
        ("abstract", "missing_field"), ("authors[1]", "wrong_type"), ("doi", "wrong_type"),
        ("quality_score", "wrong_type"), ("sections[0].text", "missing_field"), ("sections[1]", "wrong_type"),
        ("sections[2].heading", "wrong_type"), ("sections[2].text", "missing_field"), ("title", "missing_field"),
        ("year", "wrong_type"),
    ]  # fmt: skip
    (missing,) = papers.read({k: v for k, v in paper().items() if k != "quality_score"}, {}, 0.5).problems[:1]
    assert (missing.rule, missing.field) == ("missing_field", "quality_score") and "min_score" in missing.hint
    (twin,) = [p for p in papers.read(paper(pair="x"), {}, None).problems if p.severity == ERROR]
    assert (twin.rule, twin.field) == ("twin_key", "pair")


def test_columns_name_what_a_file_calls_otherwise() -> None:
    row = {"name": "T", "summary": "Of cells.", "rank": 0.2, "parts": json.dumps(paper()["sections"])}
    columns = {"title": "name", "abstract": "summary", "quality_score": "rank", "sections": "parts"}
    assert papers.read(row, columns, 0.5).is_below
    assert len(papers.read(row, columns, 0.1).examples) == 4
    (wrong,) = papers.read({**row, "name": None}, columns, 0.1).problems
    assert wrong.field == "name"


def test_papers_are_known_by_their_sections() -> None:
    assert form_of(paper(), {}) == PAPER and form_of(paper(text="x"), {}) == PAPER
    assert form_of({"title": "T", "abstract": "A", "text": "x"}, {}) == datasets_pb2.ROW_FORMAT_TEXT
    assert form_of({**paper(), "sections": "none"}, {}) == 0
    assert form_of({**paper(), "sections": json.dumps(paper()["sections"])}, {}) == PAPER  # as CSV fields hold it
    found = sniff([paper()], {})
    assert found.form == PAPER and "title, abstract, sections" in found.evidence


# Rows of one paper


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.booleans()), min_size=1, max_size=20),
    st.lists(st.integers(0, 12), min_size=20, max_size=20),
)
def test_rows_of_a_paper_are_bound_together(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, bool]], kinds: list[int]
) -> None:
    """Against a slow and plain way to the same groups: by paper, by what rows say, and by what is near to what."""
    folder = tmp_path_factory.mktemp("spool")
    segments = [segment := Segment(folder, 0)]
    for number, content, is_paper in rows:
        segment.add(b"{}", content.to_bytes(8, "little") * 2, number, number, (1, 1), 0, 0, 0, PAPER)
        if is_paper:
            segment.bind(number + 1)
        if number == 3:  # and on in another segment
            segment.close()
            segments.append(segment := Segment(folder, len(segments)))
    segment.close()
    near = np.array([kinds.index(kinds[i]) for i in range(len(rows))])
    labels = grouping.bound(Spool(folder, [0] * len(segments)), near.copy())
    assert labels is not None
    if not any(is_paper for *_, is_paper in rows):
        assert (labels == near).all()
        return
    slow = list(range(len(rows)))
    for _ in rows:
        for i, (n, c, p) in enumerate(rows):
            for j, (m, d, q) in enumerate(rows):
                if near[i] == near[j] or c == d or (p and q and n == m):
                    slow[i] = slow[j] = min(slow[i], slow[j])
    assert labels.tolist() == slow


# Through the door


def test_a_dataset_of_papers(door: Door) -> None:
    rows = [paper(i, quality_score=i / 10) for i in range(10)]
    split = datasets_pb2.Split(validation_fraction=0.3, seed=3)
    made = door.make("papers", jsonl(rows), filename="papers.jsonl", min_score=0.4, split=split)
    assert made.format == PAPER and made.stats.forms == {"paper": 24} and made.stats.below_score_papers == 4
    assert made.lineage.min_score == 0.4 and sum(made.stats.rows.values()) == 24
    assert {p.name: p.told for p in made.stats.quality.parts}["valid_rows"] == "0 of 24 rows have errors"
    sides = {name: {e["metadata"]["title"] for e in door.export(made.name, split=name)} for name in made.stats.rows}
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]
    again = door.make("papers-again", parents=[made.name], split=datasets_pb2.Split(test_fraction=0.4, seed=9))
    anew = {name: {e["metadata"]["title"] for e in door.export(again.name, split=name)} for name in again.stats.rows}
    assert anew["train"] and anew["test"] and not anew["train"] & anew["test"]
    first = door.export(made.name)[0]
    assert first["origin"]["file"] == "papers.jsonl" and first["metadata"]["year"] == 2021
    row = next(r for r in door.export(made.name, datasets_pb2.ROW_FORMAT_INSTRUCTION) if r["pair"] == "summary")
    assert row["instruction"].startswith("Summarise the paper") and row["input"].lstrip().startswith("Methods")
    answer = refusal(lambda: door.export(made.name, PAPER))
    assert answer.code == "INVALID_ARGUMENT" and "a form that is written" in answer.message


def test_papers_that_are_refused(door: Door) -> None:
    rows = [paper(), {**paper(1), "abstract": None, "sections": [{"heading": "Methods"}]}]
    request = door.request("never", jsonl(rows), filename="broken.jsonl", request_id="broken-papers")
    answer = refusal(lambda: door.updates(request))
    assert answer.fields == ["broken.jsonl:2 abstract", "broken.jsonl:2 sections[0].text"]
    every = door.request("never", jsonl([paper()]), request_id="all-below", min_score=0.9)
    assert "1 papers below min_score" in refusal(lambda: door.updates(every)).message
    other = door.request("never", b'{"text": "a"}\n', request_id="no-papers", min_score=0.9)
    assert "min_score is for papers, but the rows are text" in refusal(lambda: door.updates(other)).message


@pytest.mark.parametrize(
    "fields", [{"min_score": float("nan")}, {"min_score": 1, "format": COMPLETION}], ids=["nan", "form"]
)
def test_a_score_for_what_has_none(door: Door, fields: dict[str, Any]) -> None:
    request = datasets_pb2.CreateDatasetRequest(
        request_id="score", dataset_id="score", uploads=["uploads/" + "0" * 32], **fields
    )
    assert refusal(lambda: door.updates(request)).fields == ["min_score"]


def test_a_large_file_of_papers_is_counted_by_both_processes(tmp_path: pathlib.Path) -> None:
    from services.common.frames.v1 import ingest_pb2
    from services.datasets.worker import mate

    path = tmp_path / "p.jsonl"
    path.write_bytes(jsonl([paper(i, quality_score=i) for i in range(4)]))
    request = datasets_pb2.CreateDatasetRequest(min_score=1.5)
    order = ingest_pb2.StretchOrder(
        path=str(path), end=path.stat().st_size, filename="p", format=PAPER, scratch=str(tmp_path), request=request
    )
    report = mate.parse(order)
    assert (report.below_score, report.records) == (2, 2 + 2 * 4)
