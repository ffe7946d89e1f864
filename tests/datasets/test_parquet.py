"""Tables: Parquet and Arrow become rows of plain values, or named problems."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import pathlib
import subprocess
import sys
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.datasets.worker.found import Record, Unreadable
from services.datasets.worker.sources import open_source
from tests.datasets.kit import jsonl, numbered
from tests.house import ROOT

GIB = 1 << 30
MOMENT = datetime.datetime(2024, 5, 6, 7, 8, 9, 123400)


def parquet(table: pa.Table, **fields: Any) -> bytes:
    out = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, out, **fields)
    return out.getvalue().to_pybytes()


def arrow(table: pa.Table, is_file: bool, rows_at_once: int = 100) -> bytes:
    out = pa.BufferOutputStream()
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(out, table.schema) as writer:
        for batch in table.to_batches(rows_at_once):
            writer.write_batch(batch)
    return out.getvalue().to_pybytes()


def read(tmp_path: pathlib.Path, data: bytes, name: str = "t.parquet", max_bytes: int = GIB) -> list[Record]:
    path = tmp_path / "stored"
    path.write_bytes(data)
    with open_source(path, name, max_bytes) as source:
        records = list(source.records)
        assert [r.line for r in records] == list(range(1, len(records) + 1))
        assert 0 < source.position() <= len(data) + 4096
        return records


def refused(tmp_path: pathlib.Path, data: bytes, name: str = "t.parquet", max_bytes: int = GIB) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        read(tmp_path, data, name, max_bytes)
    return caught.value


KINDS: dict[str, Any] = {
    "t.parquet": parquet,
    "zstd.parquet": lambda t: parquet(t, compression="zstd", row_group_size=70),
    "file.arrow": lambda t: arrow(t, True),
    "stream.arrow": lambda t: arrow(t, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_come_as_they_were(tmp_path: pathlib.Path, name: str) -> None:
    rows = numbered(700)
    records = read(tmp_path, KINDS[name](pa.Table.from_pylist(rows)), name)
    assert [r.row for r in records] == rows


def test_every_type_that_json_can_hold(tmp_path: pathlib.Path) -> None:
    table = pa.table(
        {
            "moment": pa.array([MOMENT, None], pa.timestamp("us")),
            "zone": pa.array([MOMENT, MOMENT], pa.timestamp("ns", "Asia/Kolkata")),
            "nanos": pa.array([1, None], pa.timestamp("ns")),
            "day": pa.array([MOMENT.date(), None]),
            "millis": pa.array([0, 86400000], pa.date64()),
            "clock": pa.array([MOMENT.time(), None], pa.time64("us")),
            "money": [decimal.Decimal("1.50"), decimal.Decimal("-3E+2")],
            "text": pa.array([b"caf\xc3\xa9", None], pa.binary()),
            "map": pa.array([[("k", MOMENT.date())], []], pa.map_(pa.string(), pa.date32())),
            "list": [[{"at": [MOMENT]}, None], None],
            "word": pa.array(["x", "y"]).dictionary_encode(),
            "large": pa.array([2**64 - 1, 1], pa.uint64()),
            "half": pa.array([1.5, 2], pa.float16()),
            "yes": [True, None],
            "null": pa.nulls(2),
        }
    )
    for name in ("t.parquet", "t.arrow"):
        data = parquet(table) if name == "t.parquet" else arrow(table, False)
        first, second = (r.row for r in read(tmp_path, data, name))
        assert first == {
            "moment": "2024-05-06T07:08:09.1234",
            "zone": "2024-05-06T07:08:09.1234Z",
            "nanos": "1970-01-01T00:00:00.000000001",
            "day": "2024-05-06",
            "millis": "1970-01-01",
            "clock": "07:08:09.1234",
            "money": "1.50",
            "text": "café",
            "map": {"k": "2024-05-06"},
            "list": [{"at": ["2024-05-06T07:08:09.1234"]}, None],
            "word": "x",
            "large": 2**64 - 1,
            "half": 1.5,
            "yes": True,
            "null": None,
        }
        assert second["money"] == "-300.00" and second["map"] == {} and second["list"] is None


def test_types_built_on_others(tmp_path: pathlib.Path) -> None:
    ident = uuid.UUID(int=7)
    idents = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([ident.bytes], pa.binary(16)))
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}']))
    lists = pa.ListArray.from_arrays([0, 1], idents)
    table = pa.table({"id": idents, "json": texts, "ids": lists})
    for name, data in (("t.parquet", parquet(table)), ("t.arrow", arrow(table, True))):
        (record,) = read(tmp_path, data, name)
        assert record.row == {"id": str(ident), "json": '{"a": 1}', "ids": [str(ident)]}


def test_many_columns(tmp_path: pathlib.Path) -> None:
    wide = pa.table({f"c{i}": [f"{i} {k}" for k in range(20)] for i in range(1000)})
    assert [len(r.row or {}) for r in read(tmp_path, parquet(wide))] == [1000] * 20


def test_what_a_row_cannot_say_is_its_problem_alone(tmp_path: pathlib.Path) -> None:
    columns = {
        "not_finite": pa.array([math.nan, 1.0, 1.0, 1.0, 1.0, 1.0]),
        "binary_value": pa.array([b"a", b"\xff\x00", b"a", b"a", b"a", b"a"]),
        "nul_character": pa.array(["a", "a", "a\0b", "a", "a", "\\u0000"]),
        "not_utf8": pa.Array.from_buffers(
            pa.string(), 6, [None, pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3, 5, 6, 7))),
                             pa.py_buffer(b"aaa\xc3\x28aa")]
        ),
        "bad_date": pa.array([0, 0, 0, 0, 2**62, 0], pa.timestamp("ms")),
    }  # fmt: skip
    records = read(tmp_path, parquet(pa.table(columns)))
    assert [r.problem.rule if r.problem else "" for r in records] == [*columns, ""]
    assert all((r.problem is None) == (r.row is not None) for r in records)
    assert records[0].problem is not None and records[0].problem.field == "not_finite"


def test_types_that_json_cannot_hold_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    deep: Any = pa.string()
    for _ in range(30):
        deep = pa.list_(deep)
    for kind, rule in (
        (pa.duration("s"), "unknown_type"),
        (pa.map_(pa.int32(), pa.string()), "unknown_type"),
        (deep, "too_deep"),
        (pa.struct([("a", pa.int8()), ("a", pa.int8())]), "twin_key"),
    ):
        error = refused(tmp_path, arrow(pa.table({"odd": pa.nulls(3, kind)}), True), "t.arrow")
        assert error.problem.rule == rule and "odd" in error.problem.field
    twins = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    assert refused(tmp_path, arrow(twins, True), "t.arrow").problem.rule == "bad_header"


def test_names_do_not_decide(tmp_path: pathlib.Path) -> None:
    data = parquet(pa.Table.from_pylist(numbered(3)))
    path = tmp_path / "stored"
    path.write_bytes(data)
    for name in ("rows.jsonl", "rows.parquet.gz", "rows.arrow"):
        with open_source(path, name, GIB) as source:
            assert (source.container, [p.rule for p in source.said]) == ("parquet", ["wrong_suffix"])
            assert len(list(source.records)) == 3
    for name in ("rows.parquet", "rows.pq", "rows.arrow"):
        error = refused(tmp_path, jsonl(numbered(3)), name)
        assert error.problem.rule == "wrong_suffix" and "is no" in error.problem.message


def test_cut_damaged_and_encrypted_files(tmp_path: pathlib.Path) -> None:
    data = parquet(pa.Table.from_pylist(numbered(5000)), row_group_size=1000, write_page_checksum=True)
    error = refused(tmp_path, data[: len(data) // 2])
    assert error.problem.rule == "broken_table" and "no end" in error.problem.message
    # A flipped byte in the third group: the first rows are read, and the place is told.
    damaged = bytearray(data)
    group = pyarrow.parquet.ParquetFile(pa.BufferReader(data)).metadata.row_group(2).column(0)
    damaged[group.data_page_offset + group.total_compressed_size - 5] ^= 1
    error = refused(tmp_path, bytes(damaged))
    assert error.problem.rule == "broken_table" and 1 <= error.line <= 3000
    assert refused(tmp_path, b"PARE" + b"0" * 50).problem.rule == "encrypted"
    assert refused(tmp_path, data[:-4] + b"PARE").problem.rule == "encrypted"
    huge = data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    assert "footer" in refused(tmp_path, huge).problem.message
    assert refused(tmp_path, b"PAR1PAR1").problem.rule == "broken_table"
    assert refused(tmp_path, parquet(pa.table({"a": pa.nulls(0)}))).problem.rule == "empty_file"
    for is_file in (True, False):
        whole = arrow(pa.Table.from_pylist(numbered(5000)), is_file)
        assert refused(tmp_path, whole[: len(whole) // 2], "t.arrow").problem.rule == "broken_table"


def test_offsets_from_outside_are_checked(tmp_path: pathlib.Path) -> None:
    data = arrow(pa.table({"text": ["aaaa", "bbbb", "cccc"]}), False)
    offsets = b"".join(i.to_bytes(4, "little") for i in (0, 4, 8, 12))
    assert data.count(offsets) == 1
    wild = b"".join(i.to_bytes(4, "little", signed=True) for i in (0, 1 << 30, -5, 12))
    assert refused(tmp_path, data.replace(offsets, wild), "t.arrow").problem.rule == "broken_table"


def test_bounds(tmp_path: pathlib.Path) -> None:
    table = pa.Table.from_pylist(numbered(5000))
    error = refused(tmp_path, parquet(table), max_bytes=10_000)
    assert error.problem.rule == "packed_too_large" and error.line == 0
    # One text, a hundred thousand times: the table says it is small, its rows are not.
    same = pa.table({"text": pa.array(["z" * 1000]).dictionary_encode().take(pa.array([0] * 100_000))})
    error = refused(tmp_path, parquet(same), max_bytes=10_000_000)
    assert error.problem.rule == "packed_too_large" and error.line >= 9_000
    long = read(tmp_path, parquet(pa.table({"text": ["ok", "z" * (9 << 20)]})))
    assert [r.problem.rule if r.problem else "" for r in long] == ["", "line_too_long"]


_BOMB = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
from services.datasets.worker.found import Unreadable
from services.datasets.worker.sources import open_source
for name in sys.argv[1:]:
    try:
        with open_source(pathlib.Path(name), name, 1 << 40) as source:
            print(sum(1 for _ in source.records))
    except Unreadable as e:
        print(e.problem.rule)
    except MemoryError:
        print("memory")
"""


def test_bombs_and_size_under_a_memory_cap(tmp_path: pathlib.Path) -> None:
    same = pa.array(["z" * 5_000_000]).dictionary_encode().take(pa.array([0] * 50_000))
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"text": same}), compression="zstd"))
    zeros = pa.table({"text": pa.array(["z" * (120 << 20)])})
    (tmp_path / "b.parquet").write_bytes(
        parquet(zeros, compression="zstd", use_dictionary=False, write_statistics=False)
    )
    rows = pa.table({"text": [f"{i} " + "word " * 400 for i in range(200)] * 250})  # 100 MB in one group
    (tmp_path / "c.parquet").write_bytes(parquet(rows, use_dictionary=False))
    told = subprocess.run(
        [sys.executable, "-c", _BOMB, *(str(tmp_path / f"{n}.parquet") for n in "abc")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.split() == ["memory", "memory", "50000"], told.stderr


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.lists(st.text()), "n": st.integers(-9, 9)}), min_size=1))
def test_json_that_became_a_table_comes_back(tmp_path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, pa.schema([("a", pa.string()), ("b", pa.list_(pa.string())), ("n", pa.int8())]))
    for name, pack in KINDS.items():
        for record, row in zip(read(tmp_path, pack(table), name), rows, strict=True):
            if "\\u0000" in json.dumps(row).replace("\\\\", ""):
                assert record.problem is not None and record.problem.rule == "nul_character"
            else:
                assert record.row == row
