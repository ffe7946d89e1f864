"""Documents through the door: items with their places, what was left out, and what cannot be read."""

from __future__ import annotations

import json
import pathlib

import pytest

from qlorad.v1 import datasets_pb2
from tests.datasets.kit import Door, refusal

GUIDE = b"""# Field guide

Everything that the station measures is written down on the day it is measured.

## Terms

**Drift**: the slow change of an instrument's zero while nothing is measured.

A blank is defined as a sample that holds everything but what is looked for.

## Calibrating the probe

Before each shift the probe is brought back to zero:

1. Rinse the probe with distilled water.
2. Dry it with paper that leaves no fibres.
3. Press the zero key and wait for the tone.

## How long does a charge last?

About nine hours in summer, and five when it freezes at night.

## Reading the log

The log is a text with one line for each minute. This prints the last one:

```python
print(open("station.log").read().splitlines()[-1])
```

## Pictures

![the station](station.png)
"""


def test_markdown_becomes_a_dataset_of_items_with_their_places(door: Door) -> None:
    made = door.make("guide", GUIDE, filename="station/guide.md")
    assert made.stats.document_items == {"heading": 1, "definition": 2, "procedure": 1, "question": 1, "code": 1}
    assert made.stats.left_out_blocks == {"picture": 1, "lone_heading": 1}
    assert made.lineage.files[0].container == "markdown"
    rows = {r["chat"]["messages"][0]["parts"][0]["text"]: r for r in door.export(made.name)}
    lines = GUIDE.decode().splitlines()
    asked = rows['What are the steps of "Calibrating the probe" in the context of "Field guide"?']
    (span,) = asked["origin"]["spans"]
    assert span["unit"] == "DOCUMENT_UNIT_LINE"
    there = lines[int(span["first"]) - 1 : int(span["last"])]
    assert "\n".join(there) == asked["chat"]["messages"][1]["parts"][0]["text"]
    assert GUIDE.decode()[int(span["begin_character"]) : int(span["end_character"])] == "\n".join(there)
    assert asked["origin"]["file"] == "station/guide.md" and asked["origin"]["line"] == span["first"]
    assert asked["metadata"] == {"rule": "procedure", "section": "Calibrating the probe"}
    assert "How long does a charge last?" in rows and 'What does "Drift" mean?' in rows
    left = [f for f in door.findings(made.name) if f.rule == "picture"]
    assert [(f.line, f.severity) for f in left] == [(lines.index("![the station](station.png)") + 1, 1)]
    assert datasets_pb2.RowFormat.Name(made.format) == "ROW_FORMAT_CHAT"


def test_documents_that_cannot_be_read_are_all_named_and_left_out_only_when_asked(door: Door) -> None:
    uploads = [
        door.send(GUIDE, "guide.md"),
        door.send(b"%PDF-1.7\n" + b"x" * 6000, "cut.pdf"),
        door.send(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 600, "old.docx"),
    ]
    refused = refusal(lambda: door.make("some", *uploads))
    assert refused.code == "INVALID_ARGUMENT" and refused.fields == ["cut.pdf", "old.docx"]
    assert "[truncated_document]" in refused.message and "before 2007" in refused.message
    plan = datasets_pb2.CreateDatasetRequest(uploads=uploads)
    told = list(door.stub.ValidateDataset(datasets_pb2.ValidateDatasetRequest(plan=plan), timeout=60))
    found = {f.rule for m in told for f in m.findings.findings if f.severity == datasets_pb2.SEVERITY_ERROR}
    assert found == {"truncated_document", "not_text"} and not told[-1].report.passes
    made = door.make("some", *uploads, request_id="skip", on_row_error=datasets_pb2.ON_ROW_ERROR_SKIP)
    assert made.stats.skipped_documents == 2 and sum(made.stats.rows.values()) == 6
    assert [f.file for f in made.lineage.files] == ["guide.md"]
    assert {f.file for f in door.findings(made.name, datasets_pb2.SEVERITY_ERROR)} == {"cut.pdf", "old.docx"}


def test_a_file_of_rows_that_cannot_be_opened_is_a_finding_of_a_validation(door: Door) -> None:
    plan = datasets_pb2.CreateDatasetRequest(uploads=[door.send(b"PK\x03\x04 and so on", "rows.jsonl")])
    *_, last = door.stub.ValidateDataset(datasets_pb2.ValidateDatasetRequest(plan=plan), timeout=60)
    assert last.report.stats.findings["archive"] == 1 and not last.report.passes


def test_sections_as_texts_and_rows_by_their_rule(door: Door) -> None:
    upload = door.send(GUIDE, "guide.md")
    whole = door.make("texts", upload, format=datasets_pb2.ROW_FORMAT_TEXT)
    first = door.export(whole.name)[0]
    assert first["completion"]["completion"].startswith("Field guide\n\nEverything") and first["origin"]["spans"]
    assert whole.stats.document_items == {"text": 5}
    split = datasets_pb2.Split(validation_fraction=0.5, seed=1, stratify_by="metadata.rule")
    made = door.make("rules", upload, split=split)
    kinds = [row["metadata"]["rule"] for row in door.export(made.name, split="validation")]
    assert kinds == ["definition"]  # of two; the others stand alone
    bare = refusal(lambda: door.make("bare", b"Prose without a heading asks for nothing.\n", filename="bare.txt"))
    assert "1 no_heading" in bare.message and "ROW_FORMAT_TEXT" in bare.message
    wrong = refusal(lambda: door.make("infill", upload, format=datasets_pb2.ROW_FORMAT_INFILL))
    assert "[document_form]" in wrong.message and "chat or text" in wrong.message


def test_a_folder_of_documents_is_read_where_it_lies(door: Door, tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "guide.md").write_bytes(GUIDE)
    (tmp_path / "README.md").write_text("# Here\n\nThis folder holds the guide of the station, and nothing else.\n")
    (tmp_path / "deep" / "log.odt").write_bytes(b"x")
    folder = datasets_pb2.FolderSource(path=str(tmp_path))
    made = door.make("folder-of-docs", folder=folder)
    assert [f.file for f in made.lineage.files] == ["README.md", "deep/guide.md"]
    assert sum(made.stats.document_items.values()) == 7
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    rows = door.make("folder-of-rows", folder=folder)
    assert [f.file for f in rows.lineage.files] == ["rows.jsonl"]
    assert any(f.rule == "left_out" and "deep/guide.md" in f.message for f in door.findings(rows.name))


def test_names_of_uploads_may_be_paths_and_lead_nowhere(door: Door) -> None:
    assert door.start(b"# x", "a/b/c.md").filename == "a/b/c.md"
    for name in ("/a.md", "../a.md", "a/../b.md", "a//b.md", "a\\b.md", "./a.md", "a.odt", "a.md.gz"):
        assert refusal(lambda name=name: door.start(b"x", name, request_id="wrong")).fields == ["filename"]


@pytest.mark.slow
def test_what_stands_in_a_dataset_of_documents_reaches_the_ledger_and_another_dataset(door: Door) -> None:
    made = door.make("once", GUIDE, filename="guide.md")
    again = door.make("twice", parents=[made.name])
    assert [r["origin"] for r in door.export(again.name)] == [r["origin"] for r in door.export(made.name)]
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in door.export(made.name))
    third = door.make("thrice", lines, filename="out.jsonl")
    assert all(r["origin"]["spans"] for r in door.export(third.name))
