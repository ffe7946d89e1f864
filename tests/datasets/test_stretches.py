"""Common rows read quickly, and large files read by two: what comes out is what the plain way gives."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import fast, forms, glance, mate, rules, stretches
from services.datasets.worker.plain import hash_of, weigh
from services.datasets.worker.spool import Spool, rows_path

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


@settings(max_examples=400, deadline=None)
@given(st.one_of(instructions.map(lambda r: (1, r)), chats.map(lambda r: (2, r))))
def test_what_is_read_quickly_is_read_the_same(pair: tuple[Any, dict[str, Any]]) -> None:
    form, row = pair
    found = fast.READERS[form](dict(row))
    if found is None:
        return
    example, problems = forms.example_of(row, form, {})
    assert problems == [] and found.example == example
    assert rules.check(example, form) == []
    joined = "\0".join(found.said)
    content, characters, words = weigh(example)
    assert hash_of(joined.encode(), found.shape) == content
    assert (len(joined) - len(found.said) + 1, found.words) == (characters, words)
    if not glance.is_worth_a_look(joined, joined.encode()):
        assert glance.look(example) == []


def test_common_rows_are_read_quickly() -> None:
    row = {"instruction": "Say 1.", "input": "now", "output": "It is 1.", "id": 1, "topic": "numbers"}
    assert fast.instruction(row) is not None
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1?"}]
    assert fast.chat({"messages": [*said, {"role": "assistant", "content": "1."}], "id": "x"}) is not None


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
