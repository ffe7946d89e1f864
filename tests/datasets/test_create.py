"""CreateDataset: every form in, one answer an id, nothing half-made, wrong rows named."""

from __future__ import annotations

import json
import random
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import psutil
import pytest

from qlorad.v1 import datasets_pb2
from services.common.shards import ShardReader, splits_in
from tests.datasets.kit import Door, jsonl, numbered, refusal, refusal_of
from tests.house import eventually

CHAT_ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "வணக்கம் 👋"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "IST"}'}}
            ],
        },
        {"role": "tool", "content": "09:00", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is nine."},
    ],
    "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
    "source": {"page": 3},
}
FORMS: dict[str, tuple[Any, bytes, str]] = {
    "jsonl-instruction": (datasets_pb2.ROW_FORMAT_INSTRUCTION, jsonl(numbered(6)), "rows.jsonl"),
    "json-instruction": (datasets_pb2.ROW_FORMAT_INSTRUCTION, json.dumps(numbered(6), indent=1).encode(), "rows.json"),
    "jsonl-chat": (datasets_pb2.ROW_FORMAT_CHAT, jsonl([CHAT_ROW]), "rows.jsonl"),
    "json-completion": (
        datasets_pb2.ROW_FORMAT_COMPLETION,
        json.dumps([{"prompt": "", "completion": "x"}, {"prompt": "a", "completion": "b"}]).encode(),
        "rows.json",
    ),
    "jsonl-text": (datasets_pb2.ROW_FORMAT_TEXT, jsonl([{"text": "one\n\ntwo"}]), "rows.ndjson"),
    "csv-instruction": (
        datasets_pb2.ROW_FORMAT_INSTRUCTION,
        b"\xef\xbb\xbfinstruction,output,level\r\n\"Say \"\"hi\"\", twice\",\"hi\r\nhi\",1\r\n",
        "rows.csv",
    ),
    "tsv-completion": (datasets_pb2.ROW_FORMAT_COMPLETION, b"prompt\tcompletion\na\tb\n", "rows.tsv"),
    "csv-chat": (
        datasets_pb2.ROW_FORMAT_CHAT,
        b'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n',
        "rows.csv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_is_sniffed_sealed_and_exported_as_it_was(door: Door, kind: str) -> None:
    form, data, filename = FORMS[kind]
    made = door.make(kind, data, filename=filename)
    assert made.name == f"datasets/{kind}" and made.format == form and made.digest.startswith("sha256:")
    assert sum(made.stats.rows.values()) == len(door.export(made.name))
    assert "format" in made.stats.findings
    out = door.export(made.name, form)
    again = door.make(f"{kind}-again", jsonl(out), filename="again.jsonl", format=form)
    assert door.export(again.name, form) == out
    if filename.endswith("l") or "json" in kind:
        given = json.loads(data) if filename == "rows.json" else [json.loads(x) for x in data.splitlines()]
        assert out == given
    assert door.stub.GetDataset(datasets_pb2.GetDatasetRequest(name=made.name)).dataset == made


def test_several_files_and_renamed_columns_make_one_dataset(door: Door) -> None:
    csv = door.send(b"question,answer,who\nWhy?,Because.,me\n", "a.csv")
    tsv = door.send(b"answer\tquestion\nSoon.\tWhen?\n", "b.tsv")
    made = door.make("mixed", csv, tsv, columns={"instruction": "question", "output": "answer"})
    rows = door.export(made.name, made.format)
    assert [(r["instruction"], r["output"], r.get("who")) for r in rows] == [
        ("Why?", "Because.", "me"),
        ("When?", "Soon.", None),
    ]
    assert [r["origin"] for r in door.export(made.name)] == [
        {"file": "a.csv", "line": "2"},
        {"file": "b.tsv", "line": "2"},
    ]
    assert len(made.source_sha256) == 2


def test_duplicates_are_dropped_counted_and_never_straddle(door: Door) -> None:
    rows = [{**r, "copy": n} for r in numbered(60) for n in range(3)]
    random.Random(1).shuffle(rows)
    split = datasets_pb2.Split(validation_fraction=0.2, test_fraction=0.1, seed=9)
    dropped = door.make("dropped", jsonl(rows), split=split)
    assert dict(dropped.stats.rows) == {"train": 42, "validation": 12, "test": 6}
    assert dropped.stats.duplicate_rows == 120 == dropped.stats.findings["exact_duplicate"]
    kept = door.make("kept", jsonl(rows), split=split, keep_duplicates=True)
    assert dict(kept.stats.rows) == {"train": 126, "validation": 36, "test": 18}

    def sides(name: str) -> dict[str, set[str]]:
        return {s: {r["output"] for r in door.export(name, 1, s)} for s in ("train", "validation", "test")}

    one, other = sides("datasets/dropped"), sides("datasets/kept")
    assert one == other
    assert (
        not one["train"] & one["validation"] and not one["train"] & one["test"] and not one["validation"] & one["test"]
    )
    random.Random(2).shuffle(rows)
    door.make("shuffled", jsonl(rows), split=split)
    assert sides("datasets/shuffled") == one
    door.make("seeded", jsonl(rows), split=datasets_pb2.Split(validation_fraction=0.2, test_fraction=0.1, seed=10))
    assert sides("datasets/seeded") != one


def test_what_was_found_is_listed_in_order(door: Door) -> None:
    rows = [*numbered(3), {"instruction": "a", "output": ""}, numbered(1)[0], "no row", {"instruction": 3}]
    made = door.make("findings", jsonl(rows), on_row_error=datasets_pb2.ON_ROW_ERROR_SKIP)
    found = [(f.line, f.rule, f.field) for f in door.findings(made.name)]
    assert found == [
        (0, "few_rows", ""),
        (0, "short_outputs", ""),
        (0, "format", ""),
        (4, "empty_output", "output"),
        (5, "exact_duplicate", ""),
        (6, "not_an_object", ""),
        (7, "wrong_type", "instruction"),
        (7, "missing_field", "output"),
    ]
    assert dict(made.stats.findings) == Counter(rule for _, rule, _ in found)
    assert (made.stats.skipped_rows, made.stats.duplicate_rows, made.stats.rows["train"]) == (3, 1, 3)
    errors = door.findings(made.name, datasets_pb2.SEVERITY_ERROR)
    assert [f.line for f in errors] == [4, 6, 7, 7] and all(f.file == "rows.jsonl" and f.hint for f in errors)


def test_enough_long_rows_bring_no_warning(door: Door) -> None:
    rows = [{"prompt": "", "completion": f"{i} " + "word " * 60} for i in range(500)]
    assert set(door.make("plenty", jsonl(rows)).stats.findings) == {"format"}


HALF = datasets_pb2.Split(validation_fraction=0.5)
BACKWARDS = {"messages": [{"role": "assistant", "content": "a"}]}
GIANT = jsonl(numbered(1)) + b'{"instruction": "' + b"x" * (9 << 20) + b'"}\n'


@pytest.mark.parametrize(
    ("data", "filename", "fields", "place", "rule"),
    [
        (b"\n \n", "blank.jsonl", {}, "blank.jsonl", "empty_file"),
        (b"instruction,output\n", "header.csv", {}, "rows", "no_rows"),
        (jsonl(numbered(2)) + b'{"instruction": \n', "bad.jsonl", {}, "bad.jsonl:3", "broken_json"),
        (b'{"instruction": "a", "output": "\xff"}\n', "latin.jsonl", {}, "latin.jsonl:1", "not_utf8"),
        (b"instruction,output\na,b\nc\n", "ragged.csv", {}, "ragged.csv:3", "ragged_row"),
        (b"question,output\na,b\n", "foreign.csv", {}, "foreign.csv", "unknown_format"),
        (b"a,b\n1,2\n", "col.csv", {"columns": {"text": "c"}}, "col.csv c", "unknown_column"),
        (jsonl(numbered(1)), "col.jsonl", {"columns": {"input": "in"}}, "rows in", "unknown_column"),
        (GIANT, "giant.jsonl", {}, "giant.jsonl:2", "line_too_long"),
        (b"\x80\x04\x95\x1a\x00", "evil.jsonl", {}, "evil.jsonl", "not_text"),
        (jsonl([{"text": "a"}]), "form.jsonl", {"format": 1}, "form.jsonl:1 instruction", "missing_field"),
        (jsonl([{"text": {"a": [[1]] * 3}}]), "type.jsonl", {}, "type.jsonl:1 text", "wrong_type"),
        (b'{"text": "\\ud800"}\n', "half.jsonl", {}, "half.jsonl:1 text", "lone_surrogate"),
        (b'{"text": "a\\u0000"}\n', "nul.jsonl", {}, "nul.jsonl:1 text", "nul_character"),
        (b'{"text": ' + b"[" * 9999, "deep.jsonl", {}, "deep.jsonl:1", "too_deep"),
        (jsonl(numbered(1)), "one.jsonl", {"split": HALF}, "rows", "split_leaves_nothing"),
        (jsonl([BACKWARDS]), "roles.jsonl", {}, "roles.jsonl:1 messages[0].role", "role_order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_rows_are_refused_by_file_line_field_and_rule(
    door: Door, data: bytes, filename: str, fields: dict[str, Any], place: str, rule: str
) -> None:
    wrong = refusal(lambda: door.make(f"wrong-{filename}", data, filename=filename, **fields))
    assert (wrong.code, wrong.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert wrong.fields[0] == place and f"[{rule}]" in wrong.violations[0][1] and "accepted: " in wrong.violations[0][1]
    assert f"datasets/wrong-{filename}" not in door.listed() and door.leftovers() == []


def test_many_wrong_rows_are_counted_and_the_first_shown(door: Door) -> None:
    data = jsonl([{"instruction": "a", "output": ""}] * 50)
    wrong = refusal(lambda: door.make("many", data))
    assert len(wrong.violations) == 20 and wrong.message.startswith("50 errors") and "30 more" in wrong.message
    assert wrong.fields[:2] == ["rows.jsonl:1 output", "rows.jsonl:2 output"]


def test_all_wrong_fields_of_the_request_are_told_at_once(door: Door) -> None:
    request = datasets_pb2.CreateDatasetRequest(
        dataset_id="Up/Case",
        uploads=["uploads/x"],
        format=99,  # type: ignore[arg-type]
        on_row_error=99,  # type: ignore[arg-type]
        split=datasets_pb2.Split(validation_fraction=1.5, test_fraction=-1),
        columns={"colour": "", "output": "a", "input": "a"},
    )
    wrong = refusal(lambda: door.updates(request))
    assert set(wrong.fields) == {
        *("request_id", "dataset_id", "uploads[0]", "format", "on_row_error", "columns"),
        *("split.validation_fraction", "split.test_fraction", "columns['colour']"),
    }
    nobody = datasets_pb2.CreateDatasetRequest(request_id="n", dataset_id="n", uploads=["uploads/" + "0" * 32])
    assert refusal(lambda: door.updates(nobody)).reason == "NOT_FOUND"
    half = door.start(b'{"text": "x"}', "half-sent.jsonl").name
    assert refusal(lambda: door.make("half-sent", half)).reason == "WRONG_STATE"


def test_an_alias_is_taken_once_and_moves_when_asked(door: Door) -> None:
    first = door.make("taken", jsonl(numbered(2)))
    taken = refusal(lambda: door.make("taken", jsonl(numbered(3)), request_id="other"))
    assert (taken.code, taken.reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    moved = door.make("taken", jsonl(numbered(3)), request_id="mover", move_alias=True)
    assert moved.digest != first.digest
    get = datasets_pb2.GetDatasetRequest
    assert door.stub.GetDataset(get(name="datasets/taken")).dataset.digest == moved.digest
    old = door.stub.GetDataset(get(name=f"datasets/{first.digest}")).dataset
    assert old.name == f"datasets/{first.digest}"


def test_one_id_is_one_answer_also_after_a_restart(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("noted", jsonl(numbered(20)), request_id="once")
    first = door.updates(request)[-1].dataset
    door.kill()
    door.again()
    assert [u.dataset for u in door.updates(request)] == [first]
    request.split.validation_fraction = 0.5
    other = refusal(lambda: door.updates(request))
    assert other.reason == "REQUEST_ID_REUSED"


BIG = jsonl(numbered(12_000))


def workers(door: Door) -> list[psutil.Process]:
    return psutil.Process(door.house.daemons["datasets"].pid).children()


def test_callers_with_one_id_share_one_worker(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("shared", BIG, request_id="shared")
    seen: set[int] = set()
    streams = [door.stub.CreateDataset(request, timeout=120) for _ in range(4)]
    answers: list[list[datasets_pb2.CreateDatasetResponse]] = []
    threads = [threading.Thread(target=lambda s=s: answers.append(list(s))) for s in streams]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        seen.update(w.pid for w in workers(door))
        threads[0].join(0.02)
    assert len(seen) == 1
    assert len(answers) == 4 and len({a[-1].dataset.SerializeToString(deterministic=True) for a in answers}) == 1
    assert all(any(u.WhichOneof("update") == "progress" for u in a) for a in answers)


def test_a_caller_who_leaves_ends_nothing(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("left", BIG, request_id="left")
    stream = door.stub.CreateDataset(request, timeout=120)
    assert next(iter(stream)).WhichOneof("update") == "progress"
    stream.cancel()
    eventually(lambda: door.listed() == ["datasets/left"], what="the dataset")
    assert door.updates(request)[-1].dataset.name == "datasets/left"


def test_kill_9_of_the_daemon_leaves_nothing_half_made(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("killed", BIG, request_id="killed")
    stream = iter(door.stub.CreateDataset(request, timeout=120))
    next(stream)
    worker = workers(door)[0]
    door.kill()
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, what="the worker's end")
    with pytest.raises(grpc.RpcError):
        list(stream)
    door.again()
    assert door.listed() == [] and door.leftovers() == []
    assert door.updates(request)[-1].dataset.stats.rows["train"] == 12_000


def test_kill_9_of_the_worker_is_told_and_can_be_tried_again(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("lost", BIG, request_id="lost")
    stream = iter(door.stub.CreateDataset(request, timeout=120))
    next(stream)
    workers(door)[0].send_signal(signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as e:
        list(stream)
    lost = refusal_of(e.value)
    assert (lost.code, lost.reason) == ("UNAVAILABLE", "WORKER_LOST") and "SIGKILL" in lost.message
    assert door.listed() == [] and door.leftovers() == []
    assert door.updates(request)[-1].dataset.name == "datasets/lost"


def test_a_drain_stops_the_run_and_leaves_nothing(own_door: Callable[..., Door]) -> None:
    door = own_door()
    request = door.request("drained", BIG, request_id="drained")
    stream = iter(door.stub.CreateDataset(request, timeout=120))
    next(stream)
    assert door.house.daemons["datasets"].stop() == 0
    with pytest.raises(grpc.RpcError) as e:
        list(stream)
    assert refusal_of(e.value).reason == "SHUTTING_DOWN"
    assert door.leftovers() == []
    door.again()
    assert door.updates(request)[-1].dataset.name == "datasets/drained"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(own_door: Callable[..., Door]) -> None:
    door = own_door("--worker-memory-bytes", str(160 << 20))
    rows = [{"text": f"{i} " + "x" * 1_000_000} for i in range(165)]
    made = door.make("large", jsonl(rows))
    assert made.stats.characters > 165_000_000
    payload = door.shelf.open("datasets", "large").payload
    assert splits_in(payload) == ["train"] and len(ShardReader(payload, "train")) == 165
    assert len(list(payload.glob("train-*.jsonl"))) == 3


def test_a_row_that_would_burst_the_worker_is_refused(own_door: Callable[..., Door]) -> None:
    door = own_door("--worker-memory-bytes", str(160 << 20))
    bomb = b'{"text": "a", "more": [' + b"[]," * 2_500_000 + b"0]}\n"
    refused = refusal(lambda: door.make("bomb", bomb))
    assert (refused.code, refused.reason) == (
        "RESOURCE_EXHAUSTED",
        "TOO_LARGE",
    ) and "167772160 bytes" in refused.message
    assert door.make("after", jsonl(numbered(3))).stats.rows["train"] == 3


def test_the_bound_on_cpu_time_is_a_setting(own_door: Callable[..., Door]) -> None:
    door = own_door("--worker-cpu-seconds", "1", "--max-workers", "1")
    refused = refusal(lambda: door.make("slow", BIG + jsonl(numbered(160_000, 12_000))))
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "TOO_LARGE") and "1 CPU" in refused.message


def test_what_it_did_is_counted(own_door: Callable[..., Door]) -> None:
    door = own_door()
    door.make("counted", jsonl([*numbered(5), *numbered(2), {}]), on_row_error=datasets_pb2.ON_ROW_ERROR_SKIP)
    address = door.house.daemons["datasets"].told["metrics"]
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    for line in (
        'qlorad_datasets_uploads_total{outcome="completed"} 1.0',
        'qlorad_datasets_rows_total{format="instruction",outcome="kept"} 5.0',
        'qlorad_datasets_rows_total{format="instruction",outcome="duplicate"} 2.0',
        'qlorad_datasets_rows_total{format="instruction",outcome="skipped"} 1.0',
        'qlorad_datasets_findings_total{rule="missing_field",severity="error"} 2.0',
        'qlorad_datasets_worker_seconds_count{outcome="done",work="ingest"} 1.0',
        'qlorad_datasets_workers{work="ingest"} 0.0',
    ):
        assert line in text, text
    assert "qlorad_datasets_upload_bytes_total " in text
