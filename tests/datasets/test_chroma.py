"""A Chroma collection as rows. What needs chromadb runs by `make test-slow`, in an environment of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault
from services.common.frames.v1 import ingest_pb2
from services.datasets.source_checks import check_chroma
from services.datasets.worker import chroma
from tests.datasets.kit import Door, refusal
from tests.house import ROOT

HAS_CHROMA = importlib.util.find_spec("chromadb") is not None
with_chroma = pytest.mark.skipif(not HAS_CHROMA, reason="chromadb is in .venv/chroma: `make test-slow` runs this there")


def read(folder: pathlib.Path, into: pathlib.Path, name: str = "notes", most: int = 1 << 30) -> ingest_pb2.FetchDone:
    order = ingest_pb2.FetchOrder(into=str(into), max_bytes=most)
    order.chroma.path, order.chroma.collection = str(folder.resolve()), name
    into.mkdir()
    return chroma.fetch(order, lambda *_: None)


def refused(*given: Any, **asked: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        read(*given, **asked)
    return caught.value


def test_a_record_is_a_row() -> None:
    metadata = {"z": 1, "answer": "B", "id": 7, "flag": True, "document": "own", "metadata.id": 1.5, "tags": ["a"]}
    assert list(chroma.row_of("r1", "Text.", metadata).items()) == [
        ("id", "r1"), ("document", "Text."), ("answer", "B"), ("metadata.document", "own"), ("flag", True),
        ("metadata.id", 7), ("metadata.metadata.id", 1.5), ("tags", ["a"]), ("z", 1),
    ]  # fmt: skip
    assert chroma.row_of("r2", None, None) == {"id": "r2"}
    with pytest.raises(Fault, match="whose metadata 'v' is 'bytes'"):
        chroma.row_of("r3", "x", {"v": b"x"})


def test_wrong_fields_are_told_at_once() -> None:
    told = check_chroma(datasets_pb2.ChromaSource(path="relative/..", collection=""))
    assert [v.field for v in told] == ["chroma.path", "chroma.collection"]
    assert not check_chroma(datasets_pb2.ChromaSource(path="/a/b", collection="notes"))


def test_what_is_no_folder_of_chroma(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    assert "chroma.sqlite3 is not there" in refused(folder, tmp_path / "a").message
    (tmp_path / "outside").write_bytes(b"SQLite format 3\x00")
    (folder / chroma.FILE).symlink_to(tmp_path / "outside")
    assert "a link out of it" in refused(folder, tmp_path / "b").message
    (folder / chroma.FILE).unlink()
    os.mkfifo(folder / chroma.FILE)
    assert "not there" in refused(folder, tmp_path / "c").message
    (folder / chroma.FILE).unlink()
    (folder / chroma.FILE).write_bytes(b"no database at all, but long enough to be one" * 100)
    assert "cannot be read" in refused(folder, tmp_path / "d").message
    fault = refused(folder, tmp_path / "e", most=100)
    assert fault.reason == errors_pb2.REASON_TOO_LARGE


def test_who_writes_is_waited_for_and_not_for_ever(tmp_path: pathlib.Path) -> None:
    writer = sqlite3.connect(tmp_path / chroma.FILE, isolation_level=None)
    writer.execute("CREATE TABLE t (x)")
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Fault) as caught:
        chroma.copied(tmp_path, tmp_path / "a", 1 << 30, patience=0.3)
    assert caught.value.reason == errors_pb2.REASON_UPSTREAM and "held by who writes" in caught.value.message
    writer.execute("INSERT INTO t VALUES (7)")
    writer.execute("COMMIT")
    copy = sqlite3.connect(chroma.copied(tmp_path, tmp_path / "b", 1 << 30) / chroma.FILE)
    assert copy.execute("SELECT x FROM t").fetchall() == [(7,)]
    copy.close()
    writer.close()


@pytest.mark.skipif(HAS_CHROMA, reason="chromadb is here")
def test_without_chromadb_the_extra_is_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    sqlite3.connect(folder / chroma.FILE).execute("CREATE TABLE t (x)").connection.close()
    fault = refused(folder, tmp_path / "into")
    assert fault.reason == errors_pb2.REASON_REJECTED and "qlorad-services[chroma]" in fault.message


def test_folders_outside_of_the_roots(own_door: Callable[..., Door], tmp_path: pathlib.Path) -> None:
    (tmp_path / "open").mkdir()
    door = own_door("--import-roots", str(tmp_path / "open"))
    for path, code in ((tmp_path, "PERMISSION_DENIED"), (tmp_path / "open" / "none", "NOT_FOUND")):
        source = datasets_pb2.ChromaSource(path=str(path), collection="notes")
        answer = refusal(lambda s=source: door.updates(door.request("never", chroma=s, request_id=f"r-{s.path[-4:]}")))
        assert answer.code == code and str(path) in answer.message


# With chromadb


def collection(folder: pathlib.Path, name: str = "notes") -> Any:
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))
    return client.get_or_create_collection(name)


def fill(folder: pathlib.Path, count: int, **metadata: Any) -> None:
    """Records in an order that is not that of their ids."""
    notes = collection(folder)
    numbers = [(i * 7919) % count for i in range(count)]
    for at in range(0, count, 2000):
        some = numbers[at : at + 2000]
        notes.add(
            ids=[f"note-{n:06d}" for n in some],
            documents=[f"Note {n} tells of line {n}." for n in some],
            embeddings=[[float(n % 10), 1.0] for n in some],
            metadatas=[{"number": n, **{k: v.format(n) for k, v in metadata.items()}} for n in some],
        )


def digest_of(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
@with_chroma
def test_a_collection_in_order_of_ids_and_untouched(tmp_path: pathlib.Path) -> None:
    store = tmp_path / "store"
    fill(store, 12_345, answer="It is {}.")
    before = digest_of(store)
    done = read(store, tmp_path / "a")
    (source,) = done.sources
    assert done.source == f"chroma:{store}#notes" and source.filename == "notes.jsonl"
    lines = pathlib.Path(source.path).read_bytes().splitlines()
    assert len(lines) == 12_345 and json.loads(lines[7]) == {
        "id": "note-000007",
        "document": "Note 7 tells of line 7.",
        "answer": "It is 7.",
        "number": 7,
    }
    assert [json.loads(line)["number"] for line in lines] == list(range(12_345))
    assert digest_of(store) == before
    assert read(store, tmp_path / "b").sources[0].sha256 == source.sha256


@pytest.mark.slow
@with_chroma
def test_a_store_of_an_older_chroma_is_read_and_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    store = tmp_path / "store"
    fill(store, 20)
    with contextlib.closing(sqlite3.connect(store / chroma.FILE)) as db:  # as the release before left it
        db.execute("DROP TABLE embedding_metadata_array")
        db.execute("DELETE FROM migrations WHERE dir = 'metadb' AND version = 6")
        db.commit()
    before = digest_of(store)
    assert len(pathlib.Path(read(store, tmp_path / "a").sources[0].path).read_bytes().splitlines()) == 20
    assert digest_of(store) == before


@pytest.mark.slow
@with_chroma
def test_the_function_that_made_the_vectors_is_not_made(tmp_path: pathlib.Path) -> None:
    from chromadb.api.types import EmbeddingFunction
    from chromadb.utils.embedding_functions import register_embedding_function

    made: list[str] = []

    class Marked(EmbeddingFunction[Any]):
        def __init__(self) -> None:
            made.append("made")

        def __call__(self, input: Any) -> Any:
            return made.append("called")

        @staticmethod
        def name() -> str:
            return "marked"

        @staticmethod
        def build_from_config(config: dict[str, Any]) -> Marked:
            return Marked()

        def get_config(self) -> dict[str, Any]:
            return {}

    register_embedding_function(Marked)  # type: ignore[arg-type]
    store = tmp_path / "store"
    fill(store, 5)
    with contextlib.closing(sqlite3.connect(store / chroma.FILE)) as db:
        told = json.dumps({"embedding_function": {"type": "known", "name": "marked", "config": {}}})
        db.execute("UPDATE collections SET config_json_str = ?", (told,))
        db.execute("""UPDATE collections SET schema_str = replace(schema_str, '"default"', '"marked"')""")
        db.commit()
    assert len(read(store, tmp_path / "into").sources) == 1 and made == []
    assert collection(tmp_path / "into" / "copy").schema and made  # who looks at it makes it


@pytest.mark.slow
@with_chroma
def test_collections_that_are_not_there_or_hold_nothing(tmp_path: pathlib.Path) -> None:
    store = tmp_path / "store"
    fill(store, 3)
    collection(store, "empty")
    fault = refused(store, tmp_path / "a", name="note")
    assert fault.reason == errors_pb2.REASON_NOT_FOUND and "there is: 'empty', 'notes'" in fault.message
    assert "which is empty" in refused(store, tmp_path / "b", name="empty").message


@pytest.mark.slow
@with_chroma
def test_a_dataset_of_a_collection(own_door: Callable[..., Door], tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "open" / "qa", 40, question="What of line {}?", answer="It is {}.")
    fill(tmp_path / "open" / "texts", 40)
    door = own_door("--import-roots", str(tmp_path / "open"))

    def source(name: str) -> datasets_pb2.ChromaSource:
        return datasets_pb2.ChromaSource(path=str(tmp_path / "open" / name), collection="notes")

    asked = door.make("asked", chroma=source("qa"))
    assert asked.format == datasets_pb2.ROW_FORMAT_COMPLETION and asked.stats.rows == {"train": 40}
    first = door.export(asked.name)[0]
    assert first["completion"] == {"prompt": "What of line 0?", "completion": "It is 0."}
    assert first["metadata"] == {"id": "note-000000", "document": "Note 0 tells of line 0.", "number": 0}
    assert first["origin"] == {"file": "notes.jsonl", "line": "1"}
    assert asked.lineage.source == f"chroma:{tmp_path / 'open' / 'qa'}#notes"

    texts = door.make("texts", chroma=source("texts"))
    assert texts.format == datasets_pb2.ROW_FORMAT_TEXT
    assert door.export(texts.name)[3]["completion"] == {"completion": "Note 3 tells of line 3."}
    columns = {"prompt": "id", "completion": "document"}
    mapped = door.make("mapped", chroma=source("texts"), columns=columns)
    assert door.export(mapped.name)[3]["completion"]["prompt"] == "note-000003"
    assert list((door.home / "state" / "fetched").iterdir()) == []


MEASURED = """
import pathlib, re, sys
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import chroma

order = ingest_pb2.FetchOrder(into=sys.argv[2], max_bytes=1 << 30)
order.chroma.path, order.chroma.collection = sys.argv[1], "notes"
pathlib.Path(sys.argv[2]).mkdir()
chroma.fetch(order, lambda *_: None)
status = pathlib.Path("/proc/self/status").read_text()
print(*(int(re.search(name + r":\\s+(\\d+)", status)[1]) << 10 for name in ("VmHWM", "VmPeak")))
"""


@pytest.mark.slow
@with_chroma
def test_memory_is_that_of_a_page(tmp_path: pathlib.Path) -> None:
    def peak(name: str, count: int) -> int:
        """Of what is resident; the address space stays below a worker's bound, however many cores there are."""
        fill(tmp_path / name, count, text="{0:06d} " * 1000)
        command = [sys.executable, "-c", MEASURED, str(tmp_path / name), str(tmp_path / f"{name}-into")]
        many = {**os.environ, "TOKIO_WORKER_THREADS": "64"}
        done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=many)
        resident, addressed = map(int, done.stdout.split())
        assert addressed < 1 << 30
        return resident

    small, large = peak("small", 2_000), peak("large", 16_000)
    rows = (tmp_path / "large-into" / "rows").stat().st_size
    assert rows > 100 << 20 and large - small < 32 << 20, (small, large, rows)
