"""Datasets in folders of this host: read where they lie, and nothing but what lies there."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import folder, layout
from tests.datasets.fetching import Bench, contents
from tests.datasets.kit import jsonl, numbered

ROWS = jsonl(numbered(20))


def put(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def here(root: pathlib.Path, max_bytes: int = 1 << 30, **fields) -> ingest_pb2.FetchDone:
    order = ingest_pb2.FetchOrder(max_bytes=max_bytes)
    order.folder.CopyFrom(datasets_pb2.FolderSource(path=str(root.resolve()), **fields))
    return folder.fetch(order, lambda *_: None)


def refused(root: pathlib.Path, **fields) -> Fault:
    with pytest.raises(Fault) as caught:
        here(root, **fields)
    return caught.value


async def test_a_folder_like_a_repository(tmp_path: pathlib.Path) -> None:
    root = put(tmp_path / "lab", {"test.jsonl": ROWS, "train/b.jsonl": ROWS, "notes.txt": b"-", ".git/x.jsonl": ROWS})
    bench = Bench(tmp_path / "home")
    done = await bench.folder(root)
    assert done.source == f"folder:{root}"
    assert [(s.filename, s.split) for s in done.sources] == [("train/b.jsonl", "train"), ("test.jsonl", "test")]
    assert {s.path for s in done.sources} == {str(root / "train/b.jsonl"), str(root / "test.jsonl")}
    assert {s.sha256 for s in done.sources} == {hashlib.sha256(ROWS).hexdigest()}
    assert contents(await bench.folder(root, splits=["test"])) == {"test.jsonl": ROWS}
    assert bench.told[-1] == ("fetch", len(ROWS), len(ROWS))


async def test_roots(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "open" / "a", {"x.jsonl": ROWS})
    put(tmp_path / "closed", {"x.jsonl": ROWS})
    (tmp_path / "open" / "way").symlink_to(tmp_path / "closed")
    (tmp_path / "open" / "round").symlink_to(tmp_path / "open" / "round")
    bench = Bench(tmp_path / "home", roots=(tmp_path / "open",))
    assert contents(await bench.folder(tmp_path / "open" / "a")) == {"x.jsonl": ROWS}
    for path, reason in (
        (tmp_path / "closed", errors_pb2.REASON_PERMISSION_DENIED),
        (tmp_path / "open" / "way", errors_pb2.REASON_PERMISSION_DENIED),
        (tmp_path / "open" / "round", errors_pb2.REASON_PERMISSION_DENIED),
        (tmp_path / "open" / "none", errors_pb2.REASON_NOT_FOUND),
        (tmp_path / "open" / "a" / "x.jsonl", errors_pb2.REASON_NOT_FOUND),
    ):
        with pytest.raises(Fault) as caught:
            await bench.folder(path)
        assert caught.value.reason == reason and str(path) in caught.value.message


def test_links(tmp_path: pathlib.Path) -> None:
    put(tmp_path, {"outside.jsonl": ROWS})
    root = put(tmp_path / "lab", {"real/train.jsonl": ROWS})
    (root / "test.jsonl").symlink_to(root / "real" / "train.jsonl")
    (root / "again").symlink_to(root / "real")
    done = here(root)
    assert [s.filename for s in done.sources] == ["real/train.jsonl", "test.jsonl"]
    assert {s.path for s in done.sources} == {str(root / "real/train.jsonl")}
    (root / "real" / "leak.jsonl").symlink_to(tmp_path / "outside.jsonl")
    fault = refused(root)
    assert fault.reason == errors_pb2.REASON_INVALID_REQUEST and "'real/leak.jsonl' is a link out" in fault.message
    (root / "real" / "leak.jsonl").unlink()
    (root / "deeper").symlink_to(tmp_path)
    assert "'deeper' is a link out" in refused(root).message


def test_what_is_no_file_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    root = put(tmp_path / "lab", {"a.jsonl": ROWS})
    os.mkfifo(root / "b.jsonl")
    assert [s.filename for s in here(root).sources] == ["a.jsonl"]
    assert refused(root, files=["b.jsonl"]).reason == errors_pb2.REASON_NOT_FOUND


def test_bounds_and_names(tmp_path: pathlib.Path) -> None:
    root = put(tmp_path / "lab", {"a.jsonl": ROWS, "b.jsonl": ROWS})
    assert refused(root, max_bytes=2 * len(ROWS) - 1).reason == errors_pb2.REASON_TOO_LARGE
    (root / "README.md").write_bytes(b"x" * (layout.MAX_TEXT_BYTES + 1))
    assert "folder.files" in refused(root).message
    assert len(here(root, files=["*.jsonl"]).sources) == 2
    put(root, {"odd\n.txt": b""})
    assert len(here(root, files=["*.jsonl"]).sources) == 2
    put(root, {"odd\n.jsonl": ROWS})
    assert "printable" in refused(root, files=["*.jsonl"]).message


def save(folder: pathlib.Path, rows: list[dict], split: str) -> None:
    """As save_to_disk leaves a dataset."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    for i, part in enumerate((table.slice(0, 7), table.slice(7))):
        with pa.OSFile(str(folder / f"data-0000{i}-of-00002.arrow"), "wb") as out:
            with pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(part)
    files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": split, "_fingerprint": "0"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_datasets_saved_to_disk(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "saved"
    for split in ("train", "test"):
        save(root / split, numbered(20), split)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    wanted = [(s, f"{s}/{n}") for s in ("train", "test") for n in names]
    assert [(s.split, s.filename) for s in here(root).sources] == wanted
    assert [(s.split, s.filename) for s in here(root / "test").sources] == [("test", n) for n in names]
    (root / "train" / names[0]).unlink()
    assert "which is not there" in refused(root).message


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=12), max_size=3), st.sampled_from(["config", "files", "splits"]))
def test_nothing_asked_for_leads_out(tmp_path: pathlib.Path, words: list[str], where: str) -> None:
    root = tmp_path / "lab"
    if not root.exists():
        put(tmp_path, {"secret.jsonl": ROWS})
        put(root, {"a.jsonl": ROWS})
    asked = [f"../{w}" for w in words] + ["../secret.jsonl", str(tmp_path / "secret.jsonl")]
    try:
        done = here(root, **{where: asked[0] if where == "config" else asked})
    except (Fault, UnicodeEncodeError):
        return
    assert [s.path for s in done.sources] == [str(root / "a.jsonl")]
