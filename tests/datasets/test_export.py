"""Exports through the door: each form in, each form out, and what a form cannot carry refused, dropped or left out."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from typing import Any

import pytest

from qlorad.v1 import datasets_pb2
from services.datasets.forms import (
    CANONICAL,
    CHAT,
    COMPLETION,
    FORMS,
    INFILL,
    INSTRUCTION,
    NAMES,
    PREFERENCE,
    SHAREGPT,
    TEXT,
)
from services.datasets.losses import CannotCarry
from services.datasets.writing import write
from tests.client.cli import Cli
from tests.contract.formats import EXAMPLES
from tests.datasets.kit import Door, jsonl, refusal

REFUSE, DROP, SKIP = datasets_pb2.ON_LOSS_REFUSE, datasets_pb2.ON_LOSS_DROP_FIELDS, datasets_pb2.ON_LOSS_SKIP_ROW
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CALL = '{"name": "now", "arguments": {"zone": "IST"}}'
ASKED, ANSWERED = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
KINDS: dict[str, tuple[Any, list[dict[str, Any]], str]] = {
    "sharegpt": (
        SHAREGPT,
        [
            {
                "conversations": [
                    {"from": "human", "value": "வணக்கம் 👋", "weight": 0.5},
                    {"from": "gpt", "value": "Let me see."},
                    {"from": "function_call", "value": CALL},
                    {"from": "observation", "value": "09:00\r\n"},
                    {"from": "bard", "value": "It is nine."},
                ],
                "tools": json.dumps([TOOL]),
                "id": "x",
            }
        ],
        "conversations",
    ),
    "preference-texts": (
        PREFERENCE,
        [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}],
        "chosen, rejected",
    ),
    "preference-turns": (
        PREFERENCE,
        [
            {
                "prompt": ASKED,
                "chosen": ANSWERED,
                "rejected": [{"role": "assistant", "content": "c"}],
                "tools": [TOOL],
            }
        ],
        "chosen, rejected",
    ),
    "infill": (INFILL, [{"prefix": "def f():\n", "middle": "\treturn 1\n", "suffix": ""}], "prefix, middle, suffix"),
    "canonical": (CANONICAL, list(EXAMPLES.values()), "of a qlorad.v1.Example"),
    "history": (
        INSTRUCTION,
        [{"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["c", "d"], ["e", "f"]]}],
        "instruction, output",
    ),
}  # fmt: skip


def exported(
    door: Door, name: str, form: Any, on_loss: Any = 0, max_rows: int = 0
) -> tuple[list[dict[str, Any]], datasets_pb2.ExportSummary]:
    """Rows, and the summary of the last message."""
    request = datasets_pb2.ExportDatasetRequest(name=name, format=form, on_loss=on_loss, max_rows=max_rows)
    messages = list(door.stub.ExportDataset(request, timeout=60))
    assert [m.HasField("summary") for m in messages] == [False] * (len(messages) - 1) + [True]
    data = b"".join(m.data for m in messages)
    return [json.loads(line) for line in data.splitlines()], messages[-1].summary


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_sniffed_and_written_as_it_was(door: Door, kind: str) -> None:
    form, rows, told = KINDS[kind]
    made = door.make(f"form-{kind}", jsonl(rows), keep_duplicates=True)
    assert made.format == form
    (said,) = [f for f in door.findings(made.name) if f.rule == "format"]
    assert f"with {NAMES[form]} rows: {len(rows)} of the first {len(rows)} have the fields {told}" in said.message
    out, summary = exported(door, made.name, form)
    assert (summary.rows, summary.skipped_rows, dict(summary.lost_fields)) == (len(rows), 0, {})
    assert [{k: v for k, v in row.items() if k != "origin"} for row in out] == rows
    if form == CANONICAL:
        again = door.make("form-again", jsonl(out), filename="again.jsonl", keep_duplicates=True)
        assert again.format == CANONICAL and door.export(again.name) == out  # where each came from, too


@pytest.fixture(scope="module")
def every(door: Door) -> str:
    """A dataset with every kind of example."""
    return door.make("every", jsonl(EXAMPLES.values()), keep_duplicates=True).name


@pytest.mark.parametrize("form", list(FORMS), ids=NAMES.get)
def test_losses_are_refused_dropped_or_left_out_as_asked(door: Door, every: str, form: Any) -> None:
    whole, kept, lost, refused = [], [], Counter[str](), {}
    for number, example in enumerate(EXAMPLES.values()):
        try:
            row, losses = write(example, form)
        except CannotCarry as e:
            refused.setdefault(number, e.field)
            continue
        kept.append(row)
        lost.update({loss.field for loss in losses})
        if losses.first_grave is None:
            whole.append(row)
        else:
            refused.setdefault(number, losses.first_grave.place)
    out, summary = exported(door, every, form, SKIP)
    if form == CANONICAL:
        assert [{k: v for k, v in row.items() if k != "origin"} for row in out] == list(EXAMPLES.values())
        return
    assert out == whole and (summary.rows, summary.skipped_rows) == (len(whole), len(EXAMPLES) - len(whole))
    first, field = next(iter(refused.items()))
    wrong = refusal(lambda: exported(door, every, form, REFUSE))
    assert (wrong.code, wrong.reason) == ("FAILED_PRECONDITION", "REJECTED")
    assert f"row {first} of train (from rows.jsonl:{first + 1}), field {field}: " in wrong.message
    assert exported(door, every, form, SKIP, max_rows=1)[0] == whole[:1]
    carried = [e for e in EXAMPLES.values() if _carries(e, form)]
    if len(carried) < len(EXAMPLES):  # dropping fields drops no row
        assert refusal(lambda: exported(door, every, form, DROP)).reason == "REJECTED"
    some = door.make(f"drops-{NAMES[form]}", jsonl(carried), keep_duplicates=True)
    out, summary = exported(door, some.name, form, DROP)
    assert out == kept and summary.rows == len(kept) and dict(summary.lost_fields) == dict(lost)


def _carries(example: dict[str, Any], form: Any) -> bool:
    try:
        write(example, form)
    except CannotCarry:
        return False
    return True


def test_tool_calls_survive_every_chat_format(door: Door) -> None:
    name = door.make("calls", jsonl(KINDS["sharegpt"][1])).name
    first = [r["chat"] for r in door.export(name)]
    for n, form in enumerate((SHAREGPT, CANONICAL, CHAT)):
        rows, summary = exported(door, name, form)
        assert not summary.lost_fields
        name = door.make(f"calls-{n}", jsonl(rows)).name
        assert [r["chat"] for r in door.export(name)] == first
    assert rows[0]["messages"][1]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"zone": "IST"}'}


def test_rows_of_another_form_are_errors_that_name_it(door: Door) -> None:
    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(3)]
    rows += [{"messages": [{"role": "user", "content": "a"}]}, {"text": "a"}, {"conversations": [{"from": "human"}]}]
    made = door.make("several", jsonl(rows), on_row_error=datasets_pb2.ON_ROW_ERROR_SKIP)
    assert made.format == COMPLETION and made.stats.skipped_rows == 3
    errors = [f for f in door.findings(made.name, datasets_pb2.SEVERITY_ERROR) if f.field == "prompt"]
    assert [(f.line, f.message.rpartition("; ")[2]) for f in errors] == [
        (4, "the row seems to be of the chat form"),
        (5, "the row seems to be of the text form"),
        (6, "the row seems to be of the sharegpt form"),
    ]
    (said,) = [f for f in door.findings(made.name) if f.rule == "format"]
    assert said.message.endswith("3 of the first 6 have the fields prompt, completion; 3 seem to be of another form")


COMMON: list[tuple[dict[str, Any], Any, str]] = [
    ({"question": "a", "answer": "b"}, COMPLETION, "question (as prompt), answer (as completion)"),
    ({"query": "a", "response": "b"}, COMPLETION, "query (as prompt), response (as completion)"),
    ({"content": "a", "path": "b.py"}, TEXT, "content (as text)"),
    ({"fim_prefix": "a", "fim_middle": "b", "fim_suffix": ""}, INFILL, "fim_prefix (as prefix), fim_middle"),
    ({"instruction": "a", "context": "b", "response": "c"}, INSTRUCTION, "context (as input)"),
    ({"question": "a", "chosen": "b", "rejected": "c"}, PREFERENCE, "question (as prompt)"),
    ({"conversation": ASKED + ANSWERED}, CHAT, "(as messages)"),
    ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, SHAREGPT, "(as conversations)"),
]  # fmt: skip


def test_fields_that_common_files_use_are_told(door: Door) -> None:
    files = [door.send(jsonl([row]), f"{n}.jsonl") for n, (row, _, _) in enumerate(COMMON)]
    made = door.make("common", *files, keep_duplicates=True)
    said = [f.message for f in door.findings(made.name) if f.rule == "format"]
    assert [f.format for f in made.lineage.files] == [form for _, form, _ in COMMON]
    assert len(said) == len(COMMON) and all(told in s for s, (_, _, told) in zip(said, COMMON, strict=True))
    assert exported(door, made.name, CANONICAL)[1].rows == len(COMMON)


def test_a_value_that_is_no_on_loss_is_refused(door: Door) -> None:
    request = datasets_pb2.ExportDatasetRequest(name="datasets/x", on_loss=9)  # type: ignore[arg-type]
    assert refusal(lambda: list(door.stub.ExportDataset(request))).fields == ["on_loss"]


def test_a_file_is_converted_and_leaves_nothing(door: Door, tmp_path: pathlib.Path) -> None:
    cli = Cli(door.home)
    rows = [{"instruction": "a", "input": "", "output": "b"}] * 2 + [{"instruction": "a", "input": "c", "output": "b"}]
    given, made = tmp_path / "rows.jsonl", tmp_path / "made.jsonl"
    given.write_bytes(jsonl(rows))
    before = door.listed()
    told = cli.inside("dataset", "convert", str(given), "--to", "chat", "--out", str(made))
    assert told == f"3 rows in {made}\n"
    assert [json.loads(line)["messages"][1]["content"] for line in made.read_text().splitlines()] == ["b"] * 3
    back = cli.inside(
        *("dataset", "convert", str(made), "--from", "chat", "--to", "instruction", "--out", str(given), "-o", "json")
    )
    assert json.loads(back) == {"file": str(given), "rows": 3, "skipped_rows": 0, "lost_fields": {}}
    assert [json.loads(line) for line in given.read_text().splitlines()] == rows
    refused = cli.run("dataset", "convert", str(given), "--to", "completion", code=1)
    assert "field messages: the completion form has no roles" in refused.stderr and not refused.stdout
    dropped = cli.run("dataset", "convert", str(given), "--to", "completion", "--on-loss", "drop-fields")
    assert [json.loads(line)["prompt"] for line in dropped.stdout.splitlines()] == ["a", "a", "a\n\nc"]
    assert dropped.stderr.splitlines()[-1] == "of these rows: 1 without parts, 3 without roles"
    assert cli.inside("dataset", "convert", str(given), "--to", "text", "--out", str(made), code=1) == ""
    assert len(made.read_text().splitlines()) == 3 and not list(tmp_path.glob("*.part"))  # as it was
    name = door.make("convertible", jsonl(rows)).name
    told = cli.inside("dataset", "convert", name, "--to", "text", "--on-loss", "skip-row", "--out", str(made))
    assert told == f"0 rows in {made}\nof these rows: 2 left out\n"
    assert cli.inside("dataset", "convert", name, "--to", "text", "--from", "chat", code=2) == ""
    assert cli.inside("dataset", "convert", name, "--to", "rhyme", code=2) == ""
    assert door.listed() == ["datasets/convertible", *before]
