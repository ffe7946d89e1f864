"""Ledgers through the door: made once, shared, read row by row, refused by name."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable

import pytest

from qlorad.v1 import datasets_pb2, messages_pb2
from tests.datasets.kit import Door, jsonl, numbered, open_door, refusal
from tests.house import House

MODEL = "models/starter-test"


@pytest.fixture
def model_door(home: pathlib.Path, house_factory: Callable[[pathlib.Path], House]) -> Door:
    return open_door(house_factory(home))


def build(door: Door, dataset: str, length: int = 256, **fields: object) -> list[datasets_pb2.BuildLedgerResponse]:
    request = datasets_pb2.BuildLedgerRequest(
        dataset=dataset, model=fields.pop("model", MODEL), max_length_tokens=length, **fields
    )
    return list(door.stub.BuildLedger(request, timeout=120))


def read(door: Door, ledger: str, split: str = "train", **fields: int) -> list[datasets_pb2.LedgerRow]:
    request = datasets_pb2.ReadLedgerRequest(ledger=ledger, split=split, **fields)
    return [row for m in door.stub.ReadLedger(request, timeout=60) for row in m.rows]


def test_a_ledger_is_made_once_read_row_by_row_and_goes_with_its_dataset(model_door: Door) -> None:
    door = model_door
    made = door.make("rows", jsonl(numbered(150)), split=datasets_pb2.Split(validation_fraction=0.2))
    answers: list[datasets_pb2.Ledger] = []
    threads = [threading.Thread(target=lambda: answers.append(build(door, made.name)[-1].ledger)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    ledger = answers[0]
    assert len(answers) == 3 and answers[1] == answers[2] == ledger
    assert ledger.dataset_digest == made.digest and ledger.over_length == datasets_pb2.OVER_LENGTH_ERROR
    assert {s.split: s.rows for s in ledger.splits} == {"train": 120, "validation": 30}
    assert build(door, f"datasets/{made.digest}")[-1].ledger == ledger

    rows = read(door, ledger.digest)
    assert [r.row for r in rows] == list(range(120))
    for row in rows:
        assert len(row.ids) == len(row.trained) == len(row.pieces) and not row.cut_ids
        trained = "".join(p for p, t in zip(row.pieces, row.trained, strict=True) if t)
        assert "It is " in trained and "Say " not in trained
    assert sum(len(r.ids) for r in rows) == ledger.splits[0].tokens
    assert sum(sum(r.trained) for r in rows) == ledger.splits[0].trained_tokens
    assert read(door, ledger.digest, first_row=118) == rows[118:]
    assert read(door, ledger.digest, first_row=5, max_rows=70) == rows[5:75]
    assert read(door, ledger.digest, first_row=120) == []
    assert refusal(lambda: read(door, ledger.digest, first_row=121)).fields == ["first_row"]
    assert refusal(lambda: read(door, ledger.digest, "test")).fields == ["split"]
    assert refusal(lambda: read(door, made.digest)).reason == "NOT_FOUND"

    freed = door.stub.DeleteDataset(datasets_pb2.DeleteDatasetRequest(request_id="d", name=made.name)).freed_bytes
    assert freed > made.size_bytes
    assert refusal(lambda: read(door, ledger.digest)).reason == "NOT_FOUND"


def test_rows_that_are_too_long_are_named_cut_or_dropped(model_door: Door) -> None:
    door = model_door
    made = door.make("long", jsonl([*numbered(3), {"instruction": "Go on.", "output": "on and " * 200}]))
    wrong = refusal(lambda: build(door, made.name, 64))
    assert wrong.code == "INVALID_ARGUMENT" and wrong.fields == ["rows.jsonl:4"]
    cut = build(door, made.name, 64, over_length=datasets_pb2.OVER_LENGTH_TRUNCATE)[-1].ledger
    assert (cut.splits[0].rows, cut.splits[0].truncated_rows) == (4, 1)
    row = read(door, cut.digest)[3]
    assert len(row.ids) == 64 and len(row.cut_ids) == cut.splits[0].cut_tokens > 0
    assert len(row.cut_pieces) == len(row.cut_ids) and "on and on" in "".join(row.cut_pieces)
    assert (row.origin.file, row.origin.line, row.source_row) == ("rows.jsonl", 4, 3)
    dropped = build(door, made.name, 64, over_length=datasets_pb2.OVER_LENGTH_DROP)[-1].ledger
    assert (dropped.splits[0].rows, dropped.splits[0].dropped_rows) == (3, 1)
    whole = build(door, made.name, 512, over_length=datasets_pb2.OVER_LENGTH_ERROR)[-1].ledger.splits[0]
    parted = build(door, made.name, 64, over_length=datasets_pb2.OVER_LENGTH_SPLIT)[-1].ledger
    pieces = [r for r in read(door, parted.digest) if r.source_row == 3]
    (told,) = parted.splits
    assert (told.split_rows, told.rows) == (1, 3 + len(pieces)) and len(pieces) > 2
    assert [r.piece for r in pieces] == list(range(len(pieces))) and {r.origin.line for r in pieces} == {4}
    assert told.trained_tokens == whole.trained_tokens, "every trained token is trained once"
    assert told.cut_tokens == sum(len(r.cut_ids) for r in pieces)


def test_a_prompt_format_is_chosen_and_a_dataset_is_measured(model_door: Door) -> None:
    door = model_door
    made = door.make("formed", jsonl(numbered(40)), split=datasets_pb2.Split(validation_fraction=0.25))
    vicuna = build(door, made.name, prompt_format=messages_pb2.PROMPT_FORMAT_VICUNA)[-1].ledger
    assert vicuna.prompt_format == messages_pb2.PROMPT_FORMAT_VICUNA
    assert vicuna.digest != build(door, made.name)[-1].ledger.digest
    row = read(door, vicuna.digest, max_rows=1)[0]
    assert "USER: Say " in row.text and row.text == "".join(row.pieces)

    def measured(**fields: object) -> datasets_pb2.DatasetMeasure:
        request = datasets_pb2.MeasureDatasetRequest(dataset=made.name, model=MODEL, **fields)
        return list(door.stub.MeasureDataset(request, timeout=60))[-1].measure

    told = measured(prompt_format=messages_pb2.PROMPT_FORMAT_VICUNA)
    assert (told.dataset_digest, told.rows) == (made.digest, 40)
    assert told.tokens == sum(s.tokens for s in vicuna.splits)
    assert told.trained_tokens == sum(s.trained_tokens for s in vicuna.splits)
    assert [f.max_length_tokens for f in told.forecasts] == [128, 256, 512, 1024] and 0 < told.quantiles[0].tokens < 256
    (short,) = measured(max_length_tokens=[10]).forecasts
    assert short.longer_rows == 40 and short.cut_tokens > 0 and 0 < short.packing_fill <= 1
    wrong = refusal(lambda: measured(max_length_tokens=[0, 8], prompt_format=99))
    assert wrong.fields == ["prompt_format", "max_length_tokens[0]"]
    assert refusal(lambda: measured(max_length_tokens=[1 << 15])).fields == ["max_length_tokens"]
    assert refusal(lambda: build(door, made.name, prompt_format=99)).fields == ["prompt_format"]


def test_wrong_requests_are_refused_by_field(model_door: Door) -> None:
    door = model_door
    door.make("some", jsonl(numbered(3)))
    wrong = refusal(lambda: build(door, "some", 0, model="x", over_length=9))
    assert wrong.fields == ["dataset", "model", "max_length_tokens", "over_length"]
    assert refusal(lambda: build(door, "datasets/nobody")).reason == "NOT_FOUND"
    assert refusal(lambda: build(door, "datasets/some", model="models/nobody")).reason == "NOT_FOUND"
    assert refusal(lambda: build(door, "datasets/some", 1 << 19)).fields == ["max_length_tokens"]
    assert refusal(lambda: read(door, "x", "dev", first_row=-1, max_rows=-1)).fields == [
        "ledger",
        "split",
        "first_row",
        "max_rows",
    ]
