"""Common rows read quickly, and large files read by two: what comes out is what the plain way gives."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.common.prompt import example as canonical
from services.datasets.worker import fast, forms, glance, mate, rules, stretches
from services.datasets.worker.jsonl import JsonLines
from services.datasets.worker.plain import weigh
from services.datasets.worker.spool import Spool, rows_path

INSTRUCTION, CHAT = datasets_pb2.ROW_FORMAT_INSTRUCTION, datasets_pb2.ROW_FORMAT_CHAT

texts = st.one_of(
    st.sampled_from(["", " ", "a", " a", "a\n", "Say it.", 'is: "so"', "தமிழ் 你好", "a  b\tc\nd", "x" * 40]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12),
)
values = st.one_of(
    texts, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.lists(texts, max_size=2)
)
others = st.dictionaries(
    st.sampled_from(["id", "topic", "system", "history", "tools", "input", "x"]), values, max_size=3
)
instructions = st.builds(lambda q, a, more: {"instruction": q, "output": a, **more}, texts, values, others)
turns = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant", "system", "tool", "human"]),
    values,
    st.dictionaries(st.sampled_from(["name", "weight"]), texts, max_size=1),
)
ODD = ("", " a", "a@example.org", "a\x07b", "\ufeffa", "Ã¤Ã¶", "\u0099a")
polite = st.lists(st.tuples(texts, texts), min_size=1, max_size=2).map(
    lambda pairs: [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
)
chats = st.builds(
    lambda messages, more: {"messages": messages, **more}, st.one_of(polite, st.lists(turns, max_size=4)), others
)


def line_of(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def read(form: Any, lines: list[bytes | None]) -> list[fast.Quick | None]:
    return fast.read(fast.READERS[form], "a file.jsonl", 7, lines)


@pytest.mark.parametrize("blank", ["\x85", "\xa0", "\u2003", "\u3000", "\u2028\u2029"])
def test_texts_of_blanks_beyond_ascii_are_read_the_plain_way(blank: str) -> None:
    """A rule has something to say of them: they are empty."""
    rows = [{"instruction": blank, "output": "a"}, {"instruction": "a", "output": blank}]
    assert read(INSTRUCTION, [line_of(row) for row in rows]) == [None, None]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": blank}]
    assert read(CHAT, [line_of({"messages": turns})]) == [None]
    assert None not in read(INSTRUCTION, [line_of({"instruction": f"a{blank}b", "output": "a"})])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(INSTRUCTION, instructions), (CHAT, chats)]).flatmap(
        lambda kind: st.tuples(st.just(kind[0]), st.lists(kind[1], min_size=1, max_size=6))
    )
)
def test_what_is_read_quickly_is_read_the_same(told: tuple[Any, list[dict[str, Any]]]) -> None:
    form, rows = told
    found = read(form, [line_of(row) for row in rows])
    assert len(found) == len(rows)
    for at, (row, quick) in enumerate(zip(rows, found, strict=True), 7):
        if quick is None:
            continue
        example, problems = forms.example_of(row, form, {})
        assert problems == [] and rules.check(example, form) == [] and glance.look(example) == []
        content, characters, words = weigh(example)
        origin = {"file": "a file.jsonl", "line": str(at)}
        assert quick == (canonical.line_of({**example, "origin": origin}), content, characters, words)


def test_common_rows_are_read_quickly() -> None:
    row = {"instruction": "Say 1: now.", "input": "now", "output": "It is 1.", "id": 1, "topic": "numbers"}
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1?"}]
    chat = {"messages": [*said, {"role": "assistant", "content": "1 \n தமிழ்"}], "id": "x"}
    assert None not in read(INSTRUCTION, [line_of(row), line_of({**row, "output": "is:\n1", "input": "é « a »"})])
    assert None not in read(CHAT, [line_of(chat)] * 3)


def test_a_row_that_needs_a_look_does_not_hide_in_a_batch() -> None:
    fine = {"instruction": "Say 1.", "output": "It is 1."}
    odd = [
        b"",
        None,
        b"[]",
        b'{"instruction": "a", "output": "b", "output": "c"}',
        b'{"instruction": "a" , "output" :"b", "output" : "c: d"}',
        b'{"instruction": "a", "output": "\\ud800"}',
        *(
            line_of({**fine, "output": said})
            for said in ("", " a", "a@example.org", "a\x07b", "\ufeffa", "Ã¤Ã¶", "\u0099a")
        ),
        line_of({**fine, "id": 1 << 60}),
        line_of({**fine, "id": 0.5}),
        line_of({**fine, "system": "x"}),
    ]
    for some in odd:
        found = read(INSTRUCTION, [line_of(fine), some, line_of(fine)])
        assert [quick is None for quick in found] == [False, True, False], some


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.integers(1, 9), st.data())
def test_every_line_comes_once_by_row_and_by_batch(lines: list[bytes], step: int, data: st.DataObject) -> None:
    class Some(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(step)

    whole = b"\n".join(lines)
    reader = JsonLines(Some(whole), 3)
    taken: list[tuple[int, bytes | None]] = []
    while (batch := reader.batch())[1]:
        taken += enumerate(batch[1], batch[0])
        if data.draw(st.booleans()) and (record := next(reader, None)) is not None:
            passed = lines[taken[-1][0] - 3 : record.line - 4]
            assert not any(line.split() for line in passed), "only blank ones are passed over"
            taken += enumerate([*passed, lines[record.line - 4]], taken[-1][0] + 1)
    told = [line for _, line in taken]
    assert [n for n, _ in taken] == list(range(4, 4 + len(taken)))
    assert told == lines[: len(told)] and not any(b"".join(lines[len(told) :]).split())


def mixed(count: int) -> bytes:
    """Rows of every kind: fine ones, odd ones, broken ones, blank lines."""
    lines = []
    for i in range(count):
        fine = {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}.", "id": i}
        kinds = (
            json.dumps(fine),
            json.dumps(fine | {"output": " blanks "}),
            json.dumps(fine | {"output": ""}),
            json.dumps(fine | {"input": "தமிழ்", "output": "write to a.person@firm.example.net"}, ensure_ascii=False),
            "",
            json.dumps(fine)[:-1],
            json.dumps(fine | {"output": "line\r\nline"}),
            json.dumps(fine),
        )
        lines.append(kinds[i % len(kinds)])
    return "\n".join(lines).encode()


def order(
    path: pathlib.Path, stretch: stretches.Stretch, scratch: pathlib.Path, segment: int
) -> ingest_pb2.StretchOrder:
    return ingest_pb2.StretchOrder(
        path=str(path),
        begin=stretch.begin,
        end=stretch.end,
        lines_before=stretch.lines_before,
        filename="rows.jsonl",
        format=datasets_pb2.ROW_FORMAT_INSTRUCTION,
        scratch=str(scratch),
        segment=segment,
    )


@pytest.mark.parametrize("stretch_bytes", [700, 5_000, 40_000])
def test_stretches_give_what_the_whole_gives(tmp_path: pathlib.Path, stretch_bytes: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mixed(3_000) + (b"\n" if stretch_bytes == 700 else b""))
    size = path.stat().st_size
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    told = mate.parse(order(path, stretches.Stretch(0, size, 0), whole, 0))
    cut = list(stretches.cut(path, 0, stretch_bytes))
    assert len(cut) > 4
    assert cut[0].begin == 0 and cut[-1].end == size
    assert all(a.end == b.begin for a, b in itertools.pairwise(cut))
    orders = (order(path, s, parts, n) for n, s in enumerate(cut))
    heard: list[int] = []
    reports = stretches.parse_all(orders, mate.parse, lambda o, r: bool(heard.append(o.segment)))
    assert sorted(heard) == list(range(len(cut)))
    assert sum(r.records for r in reports) == told.records == 3_000 - 375
    assert sum(r.skipped for r in reports) == told.skipped == 750
    joined = b"".join(rows_path(parts, n).read_bytes() for n in range(len(cut)))
    assert joined == rows_path(whole, 0).read_bytes()
    counts = {(c.rule, c.severity): c.count for c in told.finding_counts}
    total: dict[tuple[str, int], int] = {}
    for counted in (c for r in reports for c in r.finding_counts):
        total[counted.rule, counted.severity] = total.get((counted.rule, counted.severity), 0) + counted.count
    assert total == counts and len(counts) > 3
    before, rows = 0, []
    for report in reports:
        rows.append(before)
        before += report.records
    places = [(int(e["line"]), int(e["row"]) + b.rows_before) for b in Spool(parts, rows).blocks() for e in b.entries]
    assert places == [(int(e["line"]), int(e["row"])) for b in Spool(whole, [0]).blocks() for e in b.entries]


def test_enough_errors_end_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" * 50_000)
    done: list[int] = []

    def told(o: ingest_pb2.StretchOrder, report: ingest_pb2.StretchReport) -> bool:
        done.append(report.skipped)
        return sum(done) >= 1_000

    orders = (order(path, s, tmp_path, n) for n, s in enumerate(stretches.cut(path, 0, 6_000)))
    reports = stretches.parse_all(orders, mate.parse, told)
    assert 1_000 <= sum(r.skipped for r in reports) < 50_000
