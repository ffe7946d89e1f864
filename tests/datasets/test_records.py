"""Reading files: what goes in comes out, what is wrong is named with its line, memory stays bounded."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.datasets.worker.found import Record, Unreadable
from services.datasets.worker.records import MAX_ROW_BYTES, lines, open_records
from services.datasets.worker.strict_json import MAX_DEPTH, StrictJson, depth

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(text, values, min_size=1, max_size=4)


def read(data: bytes, name: str = "x.jsonl") -> tuple[str, list[str], list[Record]]:
    container, said, records = open_records(io.BytesIO(data), name)
    return container, [p.rule for p in said], list(records)


def problems(data: bytes, name: str = "x.jsonl") -> list[tuple[int, str]]:
    return [(r.line, r.problem.rule) for r in read(data, name)[2] if r.problem is not None]


def unreadable(data: bytes, name: str = "x.jsonl") -> tuple[int, str]:
    with pytest.raises(Unreadable) as e:
        read(data, name)
    return e.value.line, e.value.problem.rule


@given(st.lists(rows, min_size=1, max_size=6), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_jsonl_gives_back_every_row(given_rows: list[dict[str, Any]], ascii_: bool, end: str, bom: bool) -> None:
    data = "".join(json.dumps(r, ensure_ascii=ascii_) + end for r in given_rows).encode()
    container, said, records = read((b"\xef\xbb\xbf" if bom else b"") + data)
    assert container == "jsonl" and said == (["byte_order_mark"] if bom else [])
    assert [r.row for r in records] == given_rows
    step = 2 if end == "\n\n" else 1
    assert [r.line for r in records] == [1 + i * step for i in range(len(given_rows))]


@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from([None, 2]), st.sampled_from(["x.json", "x.jsonl"]))
def test_an_array_gives_back_every_element(given_rows: list[dict[str, Any]], indent: int | None, name: str) -> None:
    container, _, records = read(b" \n" + json.dumps(given_rows, indent=indent).encode(), name)
    assert container == "json"
    assert [(r.line, r.row) for r in records] == list(enumerate(given_rows, 1))


def test_an_array_is_read_across_windows() -> None:
    made = [{"n": i, "text": "ü" * (i % 7 * 100_000)} for i in range(60)]
    data = json.dumps(made, ensure_ascii=False).encode()
    assert len(data) > 20 << 20
    assert [r.row for r in read(data, "x.json")[2]] == made


@given(
    st.lists(st.lists(text, min_size=2, max_size=2), min_size=1, max_size=6),
    st.sampled_from([("x.csv", ","), ("x.tsv", "\t")]),
)
def test_csv_gives_back_every_field(fields: list[list[str]], kind: tuple[str, str]) -> None:
    name, delimiter = kind
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
    writer.writerows([["one", "two"], *fields])
    records = read(out.getvalue().encode(), name)[2]
    assert [r.row for r in records] == [{"one": a, "two": b} for a, b in fields]


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv"]))
def test_any_bytes_are_rows_or_named_problems(data: bytes, name: str) -> None:
    try:
        _, _, records = read(data, name)
    except Unreadable as e:
        assert e.problem.rule and e.problem.hint
        return
    for record in records:
        assert (record.row is None) != (record.problem is None)


@given(st.lists(rows, min_size=1, max_size=4), st.data())
def test_a_damaged_array_is_read_as_far_as_it_is_whole(given_rows: list[dict[str, Any]], data: st.DataObject) -> None:
    whole = json.dumps(given_rows).encode()
    cut = data.draw(st.integers(2, len(whole) - 1))
    seen = []
    with pytest.raises(Unreadable) as e:
        for record in open_records(io.BytesIO(whole[:cut]), "x.json")[2]:
            seen.append(record.row)
    assert seen == given_rows[: len(seen)]
    assert e.value.line in (len(seen), len(seen) + 1)


def test_broken_lines_are_named_and_the_rest_is_read() -> None:
    data = b'{"a": 1}\n{"a": \n[1]\n{"a": 2} x\n\n{"a": "\xff"}\n{"a": 1, "a": 2}\n{"a": NaN}\n{"b": 3}\n'
    assert problems(data) == [
        (2, "broken_json"),
        (3, "not_an_object"),
        (4, "broken_json"),
        (6, "not_utf8"),
        (7, "twin_key"),
        (8, "broken_json"),
    ]
    assert [r.row for r in read(data)[2] if r.row] == [{"a": 1}, {"b": 3}]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (r'"\ud800"', "lone_surrogate"),
        (r'"ok \udc00 x"', "lone_surrogate"),
        (r'["a", {"b\u0000": 1}]', "nul_character"),
        (r'"a\u0000b"', "nul_character"),
        ("[" * 40 + "]" * 40, "too_deep"),
        ("[" * 100_000 + "]" * 100_000, "too_deep"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "too_deep"),
        ("1" * 5000, "broken_json"),
    ],
)
def test_odd_values_are_refused_by_name(value: str, rule: str) -> None:
    data = f'{{"text": {value}}}\n{{"text": "\\ud83d\\ude00"}}\n'.encode()
    assert problems(data) == [(1, rule)]
    assert read(data)[2][1].row == {"text": "😀"}


@given(values)
def test_depth_is_what_a_recursive_count_says(value: Any) -> None:
    def count(v: Any) -> int:
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
        return (1 if isinstance(v, (dict, list)) else 0) + max(map(count, inner), default=0)

    assert depth(value) == count(value)


def test_the_bound_on_depth_is_the_bound() -> None:
    strict = StrictJson()
    for levels, rule in ((MAX_DEPTH, None), (MAX_DEPTH + 1, "too_deep")):
        problem = strict.decode("[" * levels + "]" * levels)[2]
        assert (problem and problem.rule) == rule


def test_giant_lines_are_passed_over_unheld() -> None:
    giant = b'{"text": "' + b"x" * (2 * MAX_ROW_BYTES) + b'"}\n'

    class Watch(io.BytesIO):
        longest = 0

        def readline(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            line = super().readline(size)
            self.longest = max(self.longest, len(line))
            return line

    f = Watch(b'{"a": 1}\n' + giant + b'{"a": 2}\n' + giant[:-1])
    assert [(n, line is None) for n, line in lines(f)] == [(1, False), (2, True), (3, False), (4, True)]
    assert f.longest <= MAX_ROW_BYTES + 1
    assert problems(b'{"a": 1}\n' + giant) == [(2, "line_too_long")]


@pytest.mark.parametrize(
    ("data", "name", "rule"),
    [
        (b"", "x.jsonl", "empty_file"),
        (b"\xef\xbb\xbf \n\n", "x.jsonl", "empty_file"),
        (b"[ ]", "x.json", "empty_file"),
        (b"\n \n", "x.csv", "empty_file"),
        (b"\x80\x04\x95abc", "x.jsonl", "not_text"),
        (b"PK\x03\x04", "x.csv", "not_text"),
        (b"\x1f\x8b\x08", "x.json", "not_text"),
        (b"PAR1", "x.json", "not_text"),
        ("{}".encode("utf-16"), "x.jsonl", "not_utf8"),
        (b'[{"a": 1} {"b": 2}]', "x.json", "broken_json"),
        (b'[{"a": 1}', "x.json", "broken_json"),
        (b'[{"a": 1}] x', "x.json", "broken_json"),
        (b'[{"a": "\xff"}]', "x.json", "not_utf8"),
        (b"[" + b'{"a":' * 5000, "x.json", "too_deep"),
        (b'[{"a": "' + b"x" * (MAX_ROW_BYTES + 10) + b'"}]', "x.json", "line_too_long"),
        (b"a,,c\n1,2,3\n", "x.csv", "bad_header"),
        (b"a,a\n1,2\n", "x.csv", "bad_header"),
    ],
)
def test_files_that_cannot_be_read_are_named(data: bytes, name: str, rule: str) -> None:
    try:
        found = problems(data, name)
        assert [r for _, r in found] == [rule]
    except Unreadable as e:
        assert e.problem.rule == rule


def test_ragged_and_open_csv_rows_are_named_with_their_line() -> None:
    data = b'a,b\n1,2\n3\n4,5,6\n"x\ny",7\n8,"9" z\n10,11\n12,\xff\n13,n\x00n\n14,15\n'
    assert problems(data, "x.csv") == [
        (3, "ragged_row"),
        (4, "ragged_row"),
        (7, "broken_csv"),
        (9, "not_utf8"),
        (10, "nul_character"),
    ]
    assert [r.row for r in read(data, "x.csv")[2] if r.row] == [
        {"a": "1", "b": "2"},
        {"a": "x\ny", "b": "7"},
        {"a": "10", "b": "11"},
        {"a": "14", "b": "15"},
    ]
    assert problems(b"a,b\n1," + b"x" * MAX_ROW_BYTES + b"\n1,2,3\n", "x.csv") == [
        (2, "line_too_long"),
        (3, "ragged_row"),
    ]
    assert unreadable(b'a,b\n1,"' + b"x\n" * MAX_ROW_BYTES, "x.csv")[1] == "line_too_long"


def test_an_unreadable_place_is_told() -> None:
    assert unreadable(b'[{"a": 1}, {"b": }]', "x.json") == (2, "broken_json")
