"""Sealed datasets: listed page by page, exported or refused whole, removed once and never from under a user."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlorad.v1 import artifacts_pb2, datasets_pb2
from tests.datasets.kit import Door, jsonl, numbered, refusal


def delete(door: Door, name: str, request_id: str) -> int:
    request = datasets_pb2.DeleteDatasetRequest(request_id=request_id, name=name)
    return door.stub.DeleteDataset(request, timeout=30).freed_bytes


def test_pages_are_newest_first_and_miss_nothing(own_door: Callable[..., Door]) -> None:
    door = own_door()
    names = [door.make(f"page-{i}", jsonl(numbered(2, i))).name for i in range(5)]
    bare = door.make("page-0", jsonl(numbered(9)), request_id="mover", move_alias=True)  # leaves one without alias
    door.make("page-0-too", jsonl(numbered(9)), request_id="second")  # the same bytes under another name
    seen, token = [], ""
    while True:
        page = door.stub.ListDatasets(datasets_pb2.ListDatasetsRequest(page_size=2, page_token=token), timeout=20)
        assert len(page.datasets) <= 2
        seen += list(page.datasets)
        token = page.next_page_token
        if not token:
            break
    assert [d.create_time.ToNanoseconds() for d in seen] == sorted(
        (d.create_time.ToNanoseconds() for d in seen), reverse=True
    )
    assert [d.name for d in seen[:6]] == ["datasets/page-0", "datasets/page-0-too", *reversed(names[1:])]
    assert len(seen) == 7 and seen[6].name.startswith("datasets/sha256:") and seen[0].digest == bare.digest
    for wrong in ({"page_token": "x y"}, {"page_token": "eA"}, {"page_size": -1}, {"page_size": 1001}):
        request = datasets_pb2.ListDatasetsRequest(**wrong)
        assert refusal(lambda request=request: door.stub.ListDatasets(request)).fields == [next(iter(wrong))]


def test_an_export_can_be_cut_to_split_and_rows(door: Door) -> None:
    made = door.make("cut", jsonl(numbered(30)), split=datasets_pb2.Split(validation_fraction=0.2))
    every = door.export(made.name)
    assert len(every) == 30 and len(door.export(made.name, split="validation")) == 6
    assert door.export(made.name, max_rows=7) == every[:7]
    assert set(every[0]) == {"chat", "metadata", "origin"}
    assert refusal(lambda: door.export(made.name, split="test")).fields == ["split"]
    assert refusal(lambda: door.export(made.name, split="dev")).fields == ["split"]
    assert refusal(lambda: door.export("datasets/nobody")).reason == "NOT_FOUND"


def test_a_row_that_a_form_cannot_carry_is_named(door: Door) -> None:
    made = door.make("carry", jsonl([{"prompt": "", "completion": "a"}, {"prompt": "b", "completion": "c"}]))
    wrong = refusal(lambda: door.export(made.name, datasets_pb2.ROW_FORMAT_TEXT))
    assert (wrong.code, wrong.reason) == ("FAILED_PRECONDITION", "REJECTED")
    assert "row 1 of train (from rows.jsonl:2), field prompt" in wrong.message


def test_removal_is_once_and_counts_what_it_freed(own_door: Callable[..., Door]) -> None:
    door = own_door()
    made = door.make("gone", jsonl(numbered(4)))
    door.make("twin", jsonl(numbered(4)))
    assert delete(door, "datasets/gone", "d1") == 0  # twin still points to the files
    assert delete(door, "datasets/gone", "d1") == 0
    assert refusal(lambda: delete(door, "datasets/gone", "d2")).reason == "NOT_FOUND"
    assert refusal(lambda: delete(door, "datasets/twin", "d1")).reason == "REQUEST_ID_REUSED"
    blocked = refusal(lambda: delete(door, f"datasets/{made.digest}", "d3"))
    assert blocked.reason == "IN_USE" and blocked.blockers == ("datasets/twin",)
    assert delete(door, "datasets/twin", "d4") == made.size_bytes
    door.kill()
    door.again()
    assert delete(door, "datasets/twin", "d4") == made.size_bytes
    assert door.listed() == [] and not (door.home / "store" / "datasets" / made.digest[7:]).exists()


def test_a_pinned_dataset_stays(door: Door) -> None:
    made = door.make("pinned", jsonl(numbered(7)))
    pin = door.shelf.pin(made.digest, "jobs/j1")
    blocked = refusal(lambda: delete(door, "datasets/pinned", "p1"))
    assert (blocked.code, blocked.reason, blocked.blockers) == ("FAILED_PRECONDITION", "IN_USE", ("jobs/j1",))
    assert len(door.export(made.name)) == 7
    pin.release()
    assert delete(door, "datasets/pinned", "p1") == made.size_bytes


@pytest.mark.parametrize("name", ["", "nobody", "models/x", "datasets/../x", "datasets/sha256:zz", "datasets/Up"])
def test_names_that_are_none_are_refused(door: Door, name: str) -> None:
    assert refusal(lambda: door.stub.GetDataset(datasets_pb2.GetDatasetRequest(name=name))).fields == ["name"]
    assert refusal(lambda: door.findings(name)).fields == ["name"]
    assert refusal(lambda: door.export(name)).fields == ["name"]
    assert "name" in refusal(lambda: delete(door, name, "")).fields


def test_other_artifacts_are_no_datasets(own_door: Callable[..., Door]) -> None:
    door = own_door()
    staged = door.shelf.stage()
    (staged.payload / "x").write_bytes(b"x")
    ledger = door.shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_LEDGER, {})
    name = f"datasets/{ledger.digest}"
    assert refusal(lambda: door.stub.GetDataset(datasets_pb2.GetDatasetRequest(name=name))).reason == "NOT_FOUND"
    assert refusal(lambda: delete(door, name, "d")).reason == "NOT_FOUND"
    assert ledger.folder.exists() and door.listed() == []
