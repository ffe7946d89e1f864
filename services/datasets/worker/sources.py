"""From a stored file to its records, whatever it is packed in.

Law of this room: content decides, the name only where content cannot. What is
read otherwise than its name says is said; what is not read is refused by name.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from services.datasets.worker.found import INFO, Problem, Record, Unreadable, clip
from services.datasets.worker.jsonl import JsonLines
from services.datasets.worker.packed import Damaged, Packing, Unpacked, packing_of
from services.datasets.worker.records import open_records

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_PACKED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_TABLES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_ARCHIVES = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\xfd7zXZ\x00", "packed with xz"),
    (0, b"BZh", "packed with bzip2"),
    (0, b"\x04\x22\x4d\x18", "packed with lz4"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
)
_HEAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class Source:
    """An open file and its records; closes the file at the end of its context."""

    container: str
    """How rows lie in it, with ".gz" or ".zst" where it is packed."""
    said: list[Problem]
    """What is worth saying of the file as a whole."""
    records: Iterator[Record]
    position: Callable[[], int]
    """Bytes of the stored file that have gone by."""
    close: Callable[[], None]

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: pathlib.Path, filename: str, max_unpacked_bytes: int) -> Source:
    """The records of a file. Unreadable if it is nothing that this reads, or unpacks to more than the bound.

    Holds no more of it in memory than one row, or one batch of a table. Does not
    say what the rows mean.
    """
    f = path.open("rb")
    try:
        head = f.read(_HEAD_BYTES)
        f.seek(0)
        return _open(f, path, head, filename, max_unpacked_bytes)
    except BaseException:
        f.close()
        raise


def _open(f: BinaryIO, path: pathlib.Path, head: bytes, filename: str, max_bytes: int) -> Source:
    refuse_archive(head)
    inner, packed_by_name, by_name = split_name(filename)
    table = table_of(head, by_name)
    packing = None if table else packing_of(head)
    said = [] if table or packing else _name_of_text(filename, by_name)
    if packed_by_name and packed_by_name != (packing.name if packing else ""):
        said.append(_otherwise(filename, table or (packing.name if packing else "not packed")))
    if packing is not None:
        if not packed_by_name:
            said.append(_otherwise(filename, packing.name))
        return _packed(f, packing, inner, by_name, said, max_bytes)
    if table is not None:
        if by_name != table:
            said.append(_otherwise(filename, table.capitalize()))
        return _table(f, path, table, said, max_bytes)
    container, more, records = open_records(f, inner)
    return Source(container, said + more, records, f.tell, f.close)


def split_name(filename: str) -> tuple[str, str, str]:
    """The name without what packing adds to it, that packing, and the kind of table that the rest tells ("" = none)."""
    inner, packed = filename, ""
    for suffix, packing in _PACKED.items():
        if filename.lower().endswith(suffix) and len(filename) > len(suffix):
            inner, packed = filename[: -len(suffix)], packing
            break
    kind = next((k for suffix, k in _TABLES.items() if inner.lower().endswith(suffix)), "")
    return inner, packed, kind


def table_of(head: bytes, by_name: str) -> str | None:
    """ "parquet" or "arrow", by the first bytes."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PARE"):
        raise Unreadable(Problem("encrypted", "the Parquet is encrypted", "write it without encryption"))
    if head.startswith(b"ARROW1\x00\x00"):
        return "arrow"
    # A stream begins with the length of its schema; no text begins with this byte.
    if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8:
        return "arrow"
    if head.startswith(b"FEA1"):
        raise Unreadable(Problem("wrong_suffix", "the file is Feather of version 1", "write it as Parquet"))
    return None


def refuse_archive(head: bytes, inside: str = "") -> None:
    """Unreadable if the bytes begin an archive."""
    for at, magic, what in _ARCHIVES:
        if head[at : at + len(magic)] == magic and not _is_text_after_all(magic, head):
            told = f"the file is {what}{inside}"
            raise Unreadable(Problem("archive", told, "unpack it and send the files that it holds"))


def _is_text_after_all(magic: bytes, head: bytes) -> bool:
    """Two of them are letters that a text may hold in that place too."""
    if magic == b"BZh":
        return head[4:10] != b"1AY&SY"
    return magic == b"ustar" and b"\x00" not in head[:257]


def _otherwise(filename: str, really: str) -> Problem:
    told = f"the name {clip(filename)} says otherwise, but the content is {really}"
    return Problem("wrong_suffix", told, "it was read as what it is", "", INFO)


def _name_of_text(filename: str, by_name: str) -> list[Problem]:
    """Refuses a text that is named like a table: half of a table, or something that only has its name."""
    if by_name:
        told = f"{clip(filename)} is no {by_name.capitalize()} file: its first bytes are not those of one"
        hint = f"send the {by_name.capitalize()} file whole, or name it as what it is"
        raise Unreadable(Problem("wrong_suffix", told, hint))
    return []


def _packed(f: BinaryIO, packing: Packing, inner: str, by_name: str, said: list[Problem], max_bytes: int) -> Source:
    unpacked = io.BufferedReader(Unpacked(f, packing, max_bytes), 1 << 17)
    head = unpacked.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    refuse_archive(head, f", inside {packing.name}")
    again = packing_of(head)
    if again is not None:
        told = f"the file is {again.name} inside {packing.name}"
        raise Unreadable(Problem("packed_twice", told, "pack it once"))
    if table_of(head, by_name) or by_name:
        what = (table_of(head, by_name) or by_name).capitalize()
        told = f"the file is {what} inside {packing.name}, which cannot be read as a stream"
        raise Unreadable(Problem("packed_table", told, f"unpack it; {what} is packed in itself"))
    container, more, records = open_records(unpacked, inner)
    if not isinstance(records, JsonLines):  # which know their place
        records = _placed(records)
    return Source(container + packing.suffix, said + more, records, f.tell, f.close)


def _placed(records: Iterator[Record]) -> Iterator[Record]:
    """The records; damage below them names the row that was reached."""
    line = 0
    try:
        for record in records:
            line = record.line
            yield record
    except Damaged as e:
        raise e.reached(line) from None


def _table(f: BinaryIO, path: pathlib.Path, table: str, said: list[Problem], max_bytes: int) -> Source:
    # Arrow costs 60 MB: only who sends a table pays for it.
    from services.datasets.worker import parquet

    opened = parquet.open_parquet if table == "parquet" else parquet.open_arrow
    records, position = opened(f, max_bytes)
    return Source(table, said, records, position, f.close)
