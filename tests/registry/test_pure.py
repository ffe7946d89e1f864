"""The registry's decisions, without a daemon."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import errors_pb2, registry_pb2
from services.common.errors import Fault
from services.registry import adapters, folder, models, paging
from services.registry.adapters import CONFIG, WEIGHTS, Intake
from services.registry.worker import bounded

GOOD = ["config.json", "tokenizer.json", "model.safetensors"]


def fault(call) -> Fault:
    with pytest.raises(Fault) as caught:
        call()
    return caught.value


# which files make a model


def test_a_plain_folder_is_taken_and_what_no_model_needs_is_left() -> None:
    found = [*GOOD, "README.md", "LICENSE", "chat_template.jinja", "adapter_model.safetensors", "..", "a b.safetensors"]
    assert folder.choose("models/x", found) == ("chat_template.jinja", *sorted(GOOD))


def test_every_fault_of_a_folder_is_told_at_once() -> None:
    told = fault(lambda: folder.choose("models/x", ["PYTORCH_MODEL.BIN", "modeling_x.py", "config.json"]))
    assert told.reason == errors_pb2.REASON_REJECTED
    for expected in ("PYTORCH_MODEL.BIN", "modeling_x.py", "lacks tokenizer.json", "lacks safetensors weights"):
        assert expected in told.message


@given(st.lists(st.text(max_size=30)))
def test_only_known_names_are_ever_taken(names: list[str]) -> None:
    try:
        taken = folder.choose("models/x", [*GOOD, *names])
    except Fault:
        assert any(n.lower().endswith((*folder.PICKLES, *folder.CODE)) for n in names)
        return
    assert set(GOOD) <= set(taken)
    assert all(n in folder.TAKEN or folder.WEIGHTS.fullmatch(n) for n in taken)
    assert not any("/" in n for n in taken)


# what may come in as an adapter


def test_an_intake_counts_each_file() -> None:
    intake = Intake("adapters/x", 100)
    intake.begin(CONFIG)
    intake.grow(10)
    intake.begin(WEIGHTS)
    intake.grow(60)
    intake.grow(40)
    intake.end()
    assert intake.sizes == {CONFIG: 10, WEIGHTS: 100}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("adapter_model.bin", errors_pb2.REASON_REJECTED),
        ("x.PT", errors_pb2.REASON_REJECTED),
        ("setup.py", errors_pb2.REASON_REJECTED),
        ("../adapter_config.json", errors_pb2.REASON_INVALID_REQUEST),
        ("/etc/passwd", errors_pb2.REASON_INVALID_REQUEST),
        ("", errors_pb2.REASON_INVALID_REQUEST),
        ("tokenizer.json", errors_pb2.REASON_INVALID_REQUEST),
    ],
)
def test_other_names_are_refused(path: str, reason: int) -> None:
    assert fault(lambda: Intake("adapters/x", 100).begin(path)).reason == reason


def test_an_intake_refuses_what_is_out_of_order_or_too_much() -> None:
    assert "path" in fault(lambda: Intake("adapters/x", 100).grow(1)).message
    intake = Intake("adapters/x", 100)
    intake.begin(WEIGHTS)
    assert fault(lambda: intake.grow(101)).reason == errors_pb2.REASON_TOO_LARGE
    assert fault(lambda: intake.begin(WEIGHTS)).reason == errors_pb2.REASON_INVALID_REQUEST
    assert CONFIG in fault(intake.end).message
    assert fault(lambda: intake.grow(adapters.PIECE_BYTES + 1)).reason == errors_pb2.REASON_TOO_LARGE


# requests


def test_all_violations_of_a_request_at_once() -> None:
    told = fault(lambda: models.check_starter(registry_pb2.MakeStarterModelRequest(model_id="Base!")))
    assert {v.field for v in told.violations} == {"request_id", "size", "model_id"}
    told = fault(lambda: models.check_import(registry_pb2.ImportModelRequest(path="models/x")))
    assert {v.field for v in told.violations} == {"request_id", "path", "model_id"}
    alias = registry_pb2.SetAdapterAliasRequest(alias="adapters/../x", adapter="x", expected_generation=-1)
    told = fault(lambda: adapters.check_set_alias(alias))
    assert {v.field for v in told.violations} == {"request_id", "alias", "adapter", "expected_generation"}


# pages


@given(st.lists(st.tuples(st.integers(0, 5), st.text("abc", min_size=1, max_size=3)), unique=True), st.integers(1, 4))
def test_pages_tell_everything_once_newest_first(items: list[tuple[int, str]], size: int) -> None:
    told: list[tuple[int, str]] = []
    token = ""
    while True:
        page, token = paging.page(items, lambda i: i, size, token)
        told += page
        if not token:
            break
        assert len(page) == size
    assert told == sorted(items, key=lambda i: (-i[0], i[1]))


def test_a_page_goes_on_after_its_last_item_was_removed() -> None:
    items = [(n, f"m{n}") for n in range(5)]
    _, token = paging.page(items, lambda i: i, 2, "")
    items.remove((3, "m3"))
    assert paging.page(items, lambda i: i, 2, token)[0] == [(2, "m2"), (1, "m1")]


@pytest.mark.parametrize("token", ["?", "eA", "MTIz", "////"])
def test_a_made_up_token_is_refused(token: str) -> None:
    assert fault(lambda: paging.page([], lambda i: i, 0, token)).violations[0].field == "page_token"


# strangers' JSON


@given(st.recursive(st.none() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_depth_is_that_of_the_value(value: object) -> None:
    def depth(v: object) -> int:
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert bounded.depth_of(json.dumps(value, ensure_ascii=False).encode()) == depth(value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"nul", b'{"a":1,"a":2}', b'{"a":' * 100_000, b"[" * 2_000_000, b'{"a":"\xff"}', b"\xff\xfe"],
)
def test_json_that_is_no_plain_object_is_refused(data: bytes) -> None:
    assert fault(lambda: bounded.parse_object("config.json", data)).reason == errors_pb2.REASON_REJECTED
