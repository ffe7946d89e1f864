"""Tables to records: Parquet, and Arrow as a file or a stream.

Law of this room: the only one that imports Arrow. A table is read a small batch
at a time; what it claims of its size is checked before, and what it really
gives is counted while it comes. A value becomes what JSON could hold, or a
named problem of its row.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from services.datasets.worker.columns import NotPlain, Plain, plain
from services.datasets.worker.found import Problem, Record, Unreadable, clip
from services.datasets.worker.limits import MAX_ROW_BYTES, too_long
from services.datasets.worker.strict_json import odd_text

MAX_GROUP_BYTES = 4 << 30
MAX_FOOTER_BYTES = 64 << 20
MAX_COLUMNS = 10_000
MAX_CHUNKS = 4_000_000
_BUFFER, _LEAST_BUFFER, _BUFFERS = 1 << 20, 16 << 10, 32 << 20
"""Bytes read ahead of a column: at most, at least, and of all columns together."""
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 256

Opened = tuple[Iterator[Record], Callable[[], int]]


def open_parquet(f: BinaryIO, max_bytes: int) -> Opened:
    """Rows of a Parquet file, and how much of the file has gone by."""
    _settle()
    size = f.seek(0, os.SEEK_END)
    _check_footer(f, size)
    f.seek(0)
    limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": MAX_CHUNKS}
    with _named("Parquet"):
        meta = pa.parquet.ParquetFile(f, pre_buffer=False, **limits).metadata
        # buffer_size makes Arrow read a column page by page, not a whole column of a group at once.
        buffer_size = max(_LEAST_BUFFER, min(_BUFFER, _BUFFERS // max(1, meta.num_columns)))
        table = pa.parquet.ParquetFile(
            f, metadata=meta, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True, **limits
        )
        columns = _columns(table.schema_arrow)
    rows_at_once = _check_groups(meta, max_bytes)
    total = max(1, meta.num_rows)
    gone = [0]

    def batches() -> Iterator[pa.RecordBatch]:
        with _named("Parquet"):
            yield from table.iter_batches(batch_size=rows_at_once, use_threads=False)

    records = _records(batches(), columns, max_bytes, gone)
    return records, lambda: size * min(gone[0], total) // total


def open_arrow(f: BinaryIO, max_bytes: int) -> Opened:
    """Rows of an Arrow file or stream, and how much of the file has gone by."""
    _settle()
    is_file = f.read(6) == b"ARROW1"
    f.seek(0)
    with _named("Arrow"):
        opened = pa.ipc.open_file(f) if is_file else pa.ipc.open_stream(f)
        columns = _columns(opened.schema)

    def batches() -> Iterator[pa.RecordBatch]:
        with _named("Arrow"):
            for batch in (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened:
                # Its offsets came from outside and lead anywhere until they are checked.
                batch.validate(full=True)
                yield batch

    return _records(batches(), columns, max_bytes, [0]), f.tell


def _settle() -> None:
    """Arrow's own pools reserve more than a worker may address, and keep what was freed."""
    pa.set_memory_pool(pa.system_memory_pool())


@contextlib.contextmanager
def _named(kind: str) -> Iterator[None]:
    """Arrow's own errors as those of a file. Memory that ran out is no fault of the file's form."""
    try:
        yield
    except (Unreadable, MemoryError):
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOMEM:
            raise MemoryError(str(e)) from None
        if isinstance(e, OSError) and e.errno:
            raise
        told = f"the {kind} cannot be read: {clip((str(e).splitlines() or [''])[0], 200)}"
        raise Unreadable(Problem("broken_table", told, "write the file anew; it may have been cut")) from None


def _check_footer(f: BinaryIO, size: int) -> None:
    f.seek(max(0, size - 8))
    tail = f.read(8)
    if tail[4:] == b"PARE":
        raise Unreadable(Problem("encrypted", "the Parquet is encrypted", "write it without encryption"))
    if size < 12 or tail[4:] != b"PAR1":
        told = "the Parquet has no end: its last bytes are not those of one"
        raise Unreadable(Problem("broken_table", told, "the file was cut; send it whole"))
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(size - 12, MAX_FOOTER_BYTES):
        told = f"the Parquet's footer claims {footer} bytes, in a file of {size}"
        raise Unreadable(Problem("broken_table", told, f"a footer of at most {MAX_FOOTER_BYTES} bytes"))


def _check_groups(meta: Any, max_bytes: int) -> int:
    """Refuses what would not fit; how many rows make a batch."""
    if meta.num_row_groups * max(1, meta.num_columns) > MAX_CHUNKS:
        told = f"{meta.num_row_groups} row groups of {meta.num_columns} columns"
        raise Unreadable(Problem("table_too_large", told, f"at most {MAX_CHUNKS} column chunks; write larger groups"))
    total = 0
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        if not 0 <= group.total_byte_size <= MAX_GROUP_BYTES:
            told = f"row group {number} unpacks to {group.total_byte_size} bytes"
            raise Unreadable(Problem("table_too_large", told, f"row groups of at most {MAX_GROUP_BYTES} bytes"))
        total += group.total_byte_size
        for column in range(group.num_columns):
            codec = group.column(column).compression
            if codec != "UNCOMPRESSED" and not pa.Codec.is_available(_codec(codec)):
                told = f"column {clip(group.column(column).path_in_schema)} is packed with {codec}"
                raise Unreadable(Problem("unknown_codec", told, "SNAPPY, GZIP, ZSTD, LZ4, BROTLI, or none"))
    if total > max_bytes:
        told = f"the table unpacks to {total} bytes"
        raise Unreadable(Problem("packed_too_large", told, f"at most {max_bytes} bytes"))
    if not meta.num_rows:
        raise Unreadable(Problem("empty_file", "the table holds no row", "send a file with rows"))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * meta.num_rows // max(1, total)))


def _codec(name: str) -> str:
    return name.lower() if name.lower() in ("snappy", "gzip", "brotli", "zstd", "lz4", "lz4_raw") else "lzo"


def _columns(schema: pa.Schema) -> list[tuple[str, Plain]]:
    names = schema.names
    if not names or len(names) > MAX_COLUMNS:
        raise Unreadable(Problem("bad_header", f"the table has {len(names)} columns", f"1 to {MAX_COLUMNS}"))
    twin = next((n for i, n in enumerate(names) if n in names[:i]), None) if len(set(names)) != len(names) else None
    if twin is not None:
        raise Unreadable(
            Problem("bad_header", f"the column {clip(twin)} stands twice", "give every column its own name")
        )
    return [(field.name, plain(field.type, field.name)) for field in schema]


def _records(
    batches: Iterator[pa.RecordBatch], columns: list[tuple[str, Plain]], max_bytes: int, gone: list[int]
) -> Iterator[Record]:
    given = 0
    number = 0
    try:
        for batch in batches:
            for at in range(0, batch.num_rows, _BATCH_ROWS):
                for row, problem in _rows(batch.slice(at, _BATCH_ROWS), columns):
                    number += 1
                    size, problem = _closer(row, problem)
                    given += size
                    yield Record(number, row if problem is None else None, problem)
                gone[0] = number
                if given > max_bytes:
                    told = f"the table's rows are more than {max_bytes} bytes"
                    raise Unreadable(Problem("packed_too_large", told, f"at most {max_bytes} bytes"), number)
    except Unreadable as e:
        e.line = e.line or number
        raise
    if not number:
        raise Unreadable(Problem("empty_file", "the table holds no row", "send a file with rows"))


def _rows(batch: pa.RecordBatch, columns: list[tuple[str, Plain]]) -> Iterator[tuple[dict[str, Any], Problem | None]]:
    """Rows as plain values; what is wrong in one row is that row's problem."""
    try:
        values = [kind.values(batch.column(i)) for i, (_, kind) in enumerate(columns)]
    except (NotPlain, UnicodeDecodeError) as e:
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            yield from _rows(batch.slice(0, half), columns)
            yield from _rows(batch.slice(half), columns)
        else:
            yield {}, _odd(e)
        return
    names = [name for name, _ in columns]
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True)), None


def _odd(error: NotPlain | UnicodeDecodeError) -> Problem:
    if isinstance(error, NotPlain):
        return error.problem
    byte = error.object[error.start]
    return Problem("not_utf8", f"byte 0x{byte:02x} at {error.start} of a text is not UTF-8", "write text as UTF-8")


def _closer(row: dict[str, Any], problem: Problem | None) -> tuple[int, Problem | None]:
    """The size of a row, and what a closer look finds."""
    if problem is not None:
        return 0, problem
    text = orjson.dumps(row)
    if len(text) > MAX_ROW_BYTES:
        return len(text), too_long("row")
    if b"\\u0000" in text:
        return len(text), odd_text(row)
    return len(text), None
