"""Packed files: unpacked as streams, whole or refused, never more than the bounds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from services.datasets.worker.found import INFO, Unreadable
from services.datasets.worker.packed import GZIP, ZSTD, Damaged, Packing, Unpacked
from services.datasets.worker.sources import open_source
from tests.datasets.kit import jsonl, numbered
from tests.house import ROOT

ROWS = jsonl(numbered(2000))
GIB = 1 << 30


def zstd(data: bytes, **fields: int) -> bytes:
    """As `zstd` packs: with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True, **fields).compress(data)


def read(tmp_path: pathlib.Path, data: bytes, name: str, max_bytes: int = GIB) -> tuple[str, list[str], int]:
    """Container, rules of what was said (all INFO), and how many rows."""
    path = tmp_path / "stored"
    path.write_bytes(data)
    with open_source(path, name, max_bytes) as source:
        assert all(p.severity == INFO for p in source.said)
        rows = [r for r in source.records if r.problem is None]
        assert [r.line for r in rows] == list(range(1, len(rows) + 1))
        assert source.position() == len(data)
        return source.container, [p.rule for p in source.said], len(rows)


def refused(tmp_path: pathlib.Path, data: bytes, name: str, max_bytes: int = GIB) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        read(tmp_path, data, name, max_bytes)
    return caught.value


SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"


@pytest.mark.parametrize(
    ("data", "name", "container", "said", "rows"),
    [
        (ROWS, "rows.jsonl", "jsonl", [], 2000),
        (gzip.compress(ROWS), "rows.jsonl.gz", "jsonl.gz", [], 2000),
        (gzip.compress(ROWS) * 3, "rows.jsonl.GZ", "jsonl.gz", [], 6000),
        (gzip.compress(ROWS) + b"\0" * 9000, "rows.jsonl.gz", "jsonl.gz", [], 2000),
        (zstd(ROWS), "rows.jsonl.zst", "jsonl.zst", [], 2000),
        (zstd(ROWS) + SKIPPED_FRAME + zstd(ROWS), "rows.jsonl.zst", "jsonl.zst", [], 4000),
        (SKIPPED_FRAME + zstd(ROWS), "rows.jsonl.zst", "jsonl.zst", [], 2000),
        (gzip.compress(b"[" + ROWS.strip().replace(b"\n", b",") + b"]"), "rows.json.gz", "json.gz", [], 2000),
        (zstd(b"a,b\n1,2\n"), "t.csv.zst", "csv.zst", [], 0),
        (gzip.compress(ROWS), "rows.jsonl", "jsonl.gz", ["wrong_suffix"], 2000),
        (zstd(ROWS), "rows.jsonl.gz", "jsonl.zst", ["wrong_suffix"], 2000),
        (ROWS, "rows.jsonl.gz", "jsonl", ["wrong_suffix"], 2000),
    ],
)
def test_packed_files_are_read(
    tmp_path: pathlib.Path, data: bytes, name: str, container: str, said: list[str], rows: int
) -> None:
    if "csv" in name:  # its rows begin on line 2
        path = tmp_path / "stored"
        path.write_bytes(data)
        with open_source(path, name, GIB) as source:
            assert source.container == container
            assert [r.row for r in source.records] == [{"a": "1", "b": "2"}]
    else:
        assert read(tmp_path, data, name) == (container, said, rows)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_cut_names_the_row(tmp_path: pathlib.Path, pack) -> None:
    packed = pack(ROWS)
    error = refused(tmp_path, packed[: len(packed) - 3], "rows.jsonl.gz")
    assert error.problem.rule == "broken_packing" and "cut off" in error.problem.message
    assert 1 <= error.line <= 2000 and f"line {error.line}" in error.problem.message
    assert refused(tmp_path, packed[:12], "rows.jsonl.gz").line == 0


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_damage_is_found(tmp_path: pathlib.Path, pack) -> None:
    packed = bytearray(pack(ROWS))
    packed[len(packed) // 2] ^= 0x10
    assert refused(tmp_path, bytes(packed), "x.jsonl").problem.rule == "broken_packing"


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_follows_is_named(tmp_path: pathlib.Path, pack) -> None:
    error = refused(tmp_path, pack(ROWS) + b"hello", "x.jsonl")
    assert error.problem.rule == "trailing_bytes" and str(len(pack(ROWS))) in error.problem.message
    assert error.line == 2000


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("rows.jsonl", ROWS)
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            told = tarfile.TarInfo("rows.jsonl")
            told.size = len(ROWS)
            tar.addfile(told, io.BytesIO(ROWS))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "rule", "word"),
    [
        (archive("zip"), "archive", "zip"),
        (archive("tar"), "archive", "tar"),
        (archive("tar.gz"), "archive", "tar archive, inside gzip"),
        (lzma.compress(ROWS), "archive", "xz"),
        (bz2.compress(ROWS), "archive", "bzip2"),
        (b"7z\xbc\xaf\x27\x1c" + b"0" * 100, "archive", "7z"),
        (gzip.compress(gzip.compress(ROWS)), "packed_twice", "gzip inside gzip"),
        (gzip.compress(zstd(ROWS)), "packed_twice", "zstd inside gzip"),
        (gzip.compress(b"PAR1" + b"0" * 100), "packed_table", "Parquet inside gzip"),
        (gzip.compress(b""), "empty_file", "no row"),
        (b"", "empty_file", "no row"),
        (gzip.compress(b"\x80\x04pickle"), "not_text", "pickle"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: pathlib.Path, data: bytes, rule: str, word: str) -> None:
    error = refused(tmp_path, data, "rows.jsonl")
    assert error.problem.rule == rule and word in error.problem.message


@pytest.mark.parametrize("column", ["BZh1", "x" * 257 + "ustar"])
def test_a_text_may_look_like_an_archive(tmp_path: pathlib.Path, column: str) -> None:
    path = tmp_path / "stored"
    path.write_text(f"{column},b\n1,2\n")
    with open_source(path, "t.csv", GIB) as source:
        assert [r.row for r in source.records] == [{column: "1", "b": "2"}]


def test_bounds(tmp_path: pathlib.Path) -> None:
    error = refused(tmp_path, gzip.compress(ROWS), "rows.jsonl.gz", len(ROWS) - 1)
    assert error.problem.rule == "packed_too_large" and error.line < 2000
    assert read(tmp_path, gzip.compress(ROWS), "rows.jsonl.gz", len(ROWS))[2] == 2000
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    ).compressobj()
    error = refused(tmp_path, wide.compress(ROWS) + wide.flush(), "rows.jsonl.zst")
    assert error.problem.rule == "packed_too_large" and "window" in error.problem.message


_BOMB = """
import pathlib, resource, sys
from services.datasets.worker.found import Unreadable
from services.datasets.worker.sources import open_source
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
for name in sys.argv[1:]:
    try:
        with open_source(pathlib.Path(name), name, 1 << 40) as source:
            print(sum(1 for _ in source.records))
    except Unreadable as e:
        print(e.problem.rule)
"""


def test_bombs_under_a_memory_cap(tmp_path: pathlib.Path) -> None:
    zeros = bytes(64 << 20)
    bombs = {
        "a.jsonl.gz": gzip.compress(zeros) * 40,
        "b.jsonl.zst": zstd(zeros) * 40,
        "c.jsonl.gz": gzip.compress(b'{"text": "' + zeros),
        "d.csv.zst": zstd(b'a,b\n"') + zstd(zeros) * 40,
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    told = subprocess.run(
        [sys.executable, "-c", _BOMB, *(str(tmp_path / n) for n in bombs)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.split() == ["packed_bomb"] * 4, told.stderr


PACKINGS = st.sampled_from([(GZIP, gzip.compress), (ZSTD, zstd)])


def unpacked(data: bytes, packing: Packing, sizes: list[int]) -> bytes:
    stream, found, turn = Unpacked(io.BytesIO(data), packing, GIB), b"", 0
    while piece := stream.read(sizes[turn % len(sizes)]):
        found, turn = found + piece, turn + 1
    assert stream.tell() == len(found)
    return found


@settings(max_examples=60, deadline=None)
@given(PACKINGS, st.lists(st.binary(max_size=4000), min_size=1, max_size=4), st.lists(st.integers(1, 5000), min_size=1))
def test_any_bytes_come_back(packing, parts: list[bytes], sizes: list[int]) -> None:
    how, pack = packing
    assert unpacked(b"".join(map(pack, parts)), how, sizes) == b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(PACKINGS, st.binary(min_size=1, max_size=4000), st.data())
def test_no_cut_passes_for_an_end(packing, data: bytes, draw) -> None:
    how, pack = packing
    packed = pack(data)
    cut = draw.draw(st.integers(1, len(packed) - 1))
    with pytest.raises(Damaged):
        unpacked(packed[:cut], how, [1000])


@settings(max_examples=40, deadline=None)
@given(PACKINGS, st.binary(min_size=1, max_size=3000), st.lists(st.integers(0, 3000), max_size=5))
def test_seeking_back_reads_the_same(packing, data: bytes, places: list[int]) -> None:
    how, pack = packing
    stream = io.BufferedReader(Unpacked(io.BytesIO(pack(data)), how, GIB), 256)
    for place in places:
        stream.seek(min(place, len(data)))
        assert stream.read(100) == data[place : place + 100]
