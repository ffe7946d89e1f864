"""Every kind of source through the door: packed uploads, tables, hubs, folders; sealed with what they came from."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
from collections.abc import Callable, Iterator

import grpc
import pyarrow as pa
import pytest
import zstandard

from qlorad.v1 import datasets_pb2
from tests.contract.reference import scrape
from tests.datasets.kit import Door, jsonl, numbered, open_door, refusal
from tests.datasets.setting import as_docx, as_pdf
from tests.datasets.site import Site, site
from tests.datasets.test_parquet import parquet
from tests.house import House, eventually, house
from tests.hub.kit import Server, serving

ROWS = numbered(30)
TABLE = pa.Table.from_pylist(ROWS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        server.put(
            "lab/notes",
            {
                "data/train.parquet": parquet(TABLE),
                "data/test.parquet": parquet(pa.Table.from_pylist(numbered(5, 900))),
            },
        )
        server.put("lab/notes", {"extra.csv": b"instruction,output\n"})
        server.put("lab/bad", {"train.jsonl.gz": gzip.compress(jsonl(ROWS))[:-20]})
        server.put("lab/slow", {"train.jsonl.gz": gzip.compress(jsonl(numbered(3000)), 0)})
        yield server


@pytest.fixture(scope="module")
def web() -> Iterator[Site]:
    with site() as running:
        yield running


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, hub: Server, web: Site) -> Iterator[Door]:
    """A daemon that knows the hub, folders below one root, and one site."""
    root = tmp_path_factory.mktemp("far")
    (root / "open").mkdir()
    flags = ("--hub-endpoint", hub.url, "--import-roots", str(root / "open"), "--web-hosts", web.host())
    with house(root / "home") as h:
        yield open_door(h, *flags)


@pytest.mark.parametrize(
    ("name", "data", "container"),
    [
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS)), "jsonl.gz"),
        ("rows.jsonl.zst", zstandard.compress(jsonl(ROWS)), "jsonl.zst"),
        ("rows.parquet", parquet(TABLE), "parquet"),
        ("wrong.jsonl", parquet(TABLE), "parquet"),
    ],
)
def test_uploads_of_every_packing(door: Door, name: str, data: bytes, container: str) -> None:
    dataset = door.make(f"packed-{container}-{name.partition('.')[0]}", data, filename=name)
    assert dataset.stats.rows == {"train": 30}
    (file,) = dataset.lineage.files
    assert (file.file, file.container, file.size_bytes) == (name, container, len(data))
    rows = door.export(dataset.name, datasets_pb2.ROW_FORMAT_INSTRUCTION)
    assert [r["output"] for r in rows] == [r["output"] for r in ROWS]
    wrong = [f for f in door.findings(dataset.name) if f.rule == "wrong_suffix"]
    assert len(wrong) == (name == "wrong.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("cut.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "cut off"),
        ("bomb.jsonl.gz", gzip.compress(bytes(64 << 20)) * 3, "1000 times"),
        ("text.parquet", jsonl(ROWS), "no Parquet"),
        ("cut.parquet", parquet(TABLE)[:-50], "no end"),
    ],
)
def test_what_cannot_be_read_leaves_nothing(door: Door, name: str, data: bytes, word: str) -> None:
    request = door.request("never", data, filename=name, request_id=f"never-{name}")
    answer = refusal(lambda: door.updates(request))
    assert answer.code == "INVALID_ARGUMENT" and word in answer.message and name in answer.message
    assert "datasets/never" not in door.listed() and door.leftovers() == []


def test_a_dataset_of_a_hub(far: Door, hub: Server) -> None:
    request = far.request(
        "notes", hub=datasets_pb2.HubSource(repo="lab/notes"), split=datasets_pb2.Split(keep_source=True)
    )
    updates = far.updates(request)
    dataset = updates[-1].dataset
    assert dataset.stats.rows == {"train": 30, "test": 5}
    assert dataset.lineage.source.startswith("hub:lab/notes@")
    assert [(f.file, f.container) for f in dataset.lineage.files] == [
        ("data/train.parquet", "parquet"),
        ("data/test.parquet", "parquet"),
    ]
    assert far.export(dataset.name, split="test")[0]["origin"] == {"file": "data/test.parquet", "line": "1"}
    (left,) = [f for f in far.findings(dataset.name) if f.rule == "left_out"]
    assert "extra.csv" in left.message and left.severity == datasets_pb2.SEVERITY_INFO
    assert far.updates(request)[-1].dataset == dataset


def test_refusals_of_a_hub(far: Door, hub: Server) -> None:
    for i, (source, code, word) in enumerate(
        (
            ({"repo": "lab/none"}, "NOT_FOUND", "lab/none"),
            ({"repo": "lab/notes", "splits": ["dev"]}, "NOT_FOUND", "'train', 'test'"),
            ({"repo": "../x", "revision": ".."}, "INVALID_ARGUMENT", "hub.revision"),
            ({"repo": "lab/bad"}, "INVALID_ARGUMENT", "cut off"),
        )
    ):
        request = far.request("never", hub=datasets_pb2.HubSource(**source), request_id=f"hub-{i}")
        answer = refusal(lambda request=request: far.updates(request))
        assert answer.code == code and word in answer.message
    hub.order("throttle", "GET /api", retry_after="1800")
    request = far.request("never", hub=datasets_pb2.HubSource(repo="lab/notes"), request_id="patience")
    answer = refusal(lambda: far.updates(request))
    assert (answer.code, answer.reason) == ("UNAVAILABLE", "UPSTREAM")
    assert "datasets/never" not in far.listed() and far.leftovers() == []


def test_a_folder(far: Door) -> None:
    root = far.home.parent
    (root / "open" / "a").mkdir()
    (root / "open" / "a" / "train.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS)))
    (root / "open" / "a" / "dev.csv").write_text("instruction,output\nSay,It\n")
    for i, (path, code) in enumerate(
        ((root, "PERMISSION_DENIED"), (root / "open" / "b", "NOT_FOUND"), ("open", "INVALID_ARGUMENT"))
    ):
        request = far.request("never", folder=datasets_pb2.FolderSource(path=str(path)), request_id=f"folder-{i}")
        assert refusal(lambda request=request: far.updates(request)).code == code
    folder = datasets_pb2.FolderSource(path=str(root / "open" / "a"), files=["*.zst", "*.csv"])
    dataset = far.make("folder", folder=folder, split=datasets_pb2.Split(keep_source=True))
    assert dataset.stats.rows == {"train": 30, "validation": 1}
    assert dataset.lineage.source == f"folder:{root / 'open' / 'a'}"
    assert (root / "open" / "a" / "dev.csv").exists()


def test_pages_by_url(far: Door, web: Site) -> None:
    rows, table = jsonl(ROWS), b"instruction,output\nSay caf\xe9,It\n"
    moved = web.move("/latest", "/v2/rows.jsonl?signature=secret")
    web.put("/v2/rows.jsonl?signature=secret", gzip.compress(rows), "application/x-ndjson", Content_Encoding="gzip")
    latin = web.put("/table", table, "text/csv; charset=iso-8859-1")
    dataset = far.make("pages", web=datasets_pb2.WebSource(urls=[moved, latin]))
    assert dataset.stats.rows == {"train": 31}
    assert dataset.lineage.source == f"web:{web.url('/v2/rows.jsonl')} and 1 more"
    assert [(f.file, f.url, f.container) for f in dataset.lineage.files] == [
        ("127.0.0.1/v2/rows.jsonl", web.url("/v2/rows.jsonl"), "jsonl"),
        ("127.0.0.1/table.csv", latin, "csv"),
    ]
    assert dataset.source_sha256[0] == hashlib.sha256(rows).hexdigest()
    last = far.export(dataset.name)[-1]
    assert last["origin"]["file"] == "127.0.0.1/table.csv" and "Say café" in str(last)
    assert list((far.home / "state" / "fetched").iterdir()) == []


def test_documents_by_url(far: Door, web: Site) -> None:
    body = "The zero of a meter moves while nothing is measured, by some µV each day, and that is called its drift."
    page = f"<html><head><meta charset='iso-8859-1'></head><body><h1>Zero drift</h1><p>{body}</p></body></html>"
    guide = f"# Terms\n\n## Zero drift of meters\n\n{body}\n"
    urls = [
        web.put("/guide/", page.encode(), "text/html; charset=utf-8"),  # who sends it knows better than the page
        web.put("/old", page.encode("latin-1"), "text/html"),
        web.put("/terms", guide.encode(), "text/markdown"),
    ]
    dataset = far.make("documents", web=datasets_pb2.WebSource(urls=urls), keep_duplicates=True)
    told = [(f.file, f.container, f.url, f.size_bytes) for f in dataset.lineage.files]
    assert told == [
        ("127.0.0.1/guide/index.html", "html", urls[0], len(page.encode())),
        ("127.0.0.1/old.html", "html", urls[1], len(page.encode("latin-1"))),
        ("127.0.0.1/terms.md", "markdown", urls[2], len(guide.encode())),
    ]
    assert dataset.source_sha256[1] == hashlib.sha256(page.encode("latin-1")).hexdigest()
    rows = far.export(dataset.name)
    assert {r["origin"]["file"] for r in rows} == {name for name, *_ in told}
    assert all(body in str(r) and r["origin"]["spans"] for r in rows)
    scored = far.request("never", web=datasets_pb2.WebSource(urls=urls[:1]), min_score=1, request_id="scored")
    assert "this is a document" in refusal(lambda: far.updates(scored)).message


@pytest.mark.slow
def test_a_pdf_and_a_docx_by_url(far: Door, web: Site) -> None:
    body = "The zero of a meter moves while nothing is measured, and that is called its drift."
    text = f"# Terms\n\n## Zero drift\n\n{body}\n"
    paper = web.put("/paper", as_pdf(text), "application/pdf")
    letter = web.put("/download.docx?id=7", as_docx(text), "application/octet-stream")
    dataset = far.make("bound", web=datasets_pb2.WebSource(urls=[paper, letter]), keep_duplicates=True)
    assert [(f.file, f.container) for f in dataset.lineage.files] == [
        ("127.0.0.1/paper.pdf", "pdf"),
        ("127.0.0.1/download.docx", "docx"),
    ]
    rows = far.export(dataset.name)
    assert {r["origin"]["file"] for r in rows} == {"127.0.0.1/paper.pdf", "127.0.0.1/download.docx"}
    cut = web.put("/cut", as_pdf(text)[:-600], "application/pdf")
    request = far.request("never", web=datasets_pb2.WebSource(urls=[cut]), request_id="cut-pdf")
    answer = refusal(lambda: far.updates(request))
    assert answer.code == "INVALID_ARGUMENT" and "127.0.0.1/cut.pdf" in answer.message


def test_refusals_of_pages(far: Door, door: Door, web: Site) -> None:
    web.move("/within", web.url("/").replace("127.0.0.1", "localhost"))
    web.put("/rows.jsonl", b'{"text": ""}\n')
    for i, (urls, code, word) in enumerate(
        (
            (["https://example.org/x"], "PERMISSION_DENIED", web.host()),
            ([web.url("/none")], "NOT_FOUND", "/none"),
            ([web.url("/within")], "PERMISSION_DENIED", "a redirect of"),
            ([web.url("/rows.jsonl")], "INVALID_ARGUMENT", "127.0.0.1/rows.jsonl:1"),
            (["file:///etc/passwd"], "INVALID_ARGUMENT", "web.urls[0]"),
        )
    ):
        request = far.request("never", web=datasets_pb2.WebSource(urls=urls), request_id=f"web-{i}")
        answer = refusal(lambda request=request: far.updates(request))
        assert answer.code == code and word in answer.message, answer
    # Nobody goes anywhere by default.
    closed = door.request("never", web=datasets_pb2.WebSource(urls=[web.url("/rows.jsonl")]), request_id="web-closed")
    answer = refusal(lambda: door.updates(closed))
    assert answer.code == "PERMISSION_DENIED" and "--web-hosts, which is empty" in answer.message
    counted = scrape(far.house, "datasets")
    assert 'qlorad_datasets_fetches_total{outcome="not_found",source="web"}' in counted
    assert list((far.home / "state" / "fetched").iterdir()) == []


@pytest.mark.slow
def test_a_killed_daemon_leaves_no_page_behind_and_its_bounds_are_settings(
    tmp_path: pathlib.Path, web: Site, house_factory: Callable[[pathlib.Path], House]
) -> None:
    bounds = ("--page-seconds", "3", "--max-page-bytes", "500000")
    far = open_door(house_factory(tmp_path / "home"), "--web-hosts", web.host(), *bounds)
    web.odd("/long", web.drip(b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\n\r\n", b"x" * 1000))
    stream = far.stub.CreateDataset(
        far.request("long", web=datasets_pb2.WebSource(urls=[web.url("/long")])), timeout=60
    )
    fetched = far.home / "state" / "fetched"
    eventually(lambda: any(p.stat().st_size for p in fetched.rglob("page-*")))
    far.kill()
    with pytest.raises(grpc.RpcError):
        list(stream)
    far.again()
    assert not fetched.exists() or list(fetched.iterdir()) == []
    web.odd("/wide", web.drip(b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\n\r\n", b"x" * 100_000))
    for path, reason, word in (("/long", "UPSTREAM", "within 3 seconds"), ("/wide", "TOO_LARGE", "at most 500000")):
        request = far.request("never", web=datasets_pb2.WebSource(urls=[web.url(path)]), request_id=f"bound{path[1:]}")
        answer = refusal(lambda request=request: far.updates(request))
        assert answer.reason == reason and word in answer.message


def test_a_killed_daemon_goes_on_where_it_was(
    tmp_path: pathlib.Path, hub: Server, house_factory: Callable[[pathlib.Path], House]
) -> None:
    far = open_door(house_factory(tmp_path / "home"), "--hub-endpoint", hub.url)
    hub.clear()
    hub.order("slow", "GET /lfs/.*train", after=50_000, seconds=0.1)
    request = far.request("slow", hub=datasets_pb2.HubSource(repo="lab/slow"))
    stream = far.stub.CreateDataset(request, timeout=60)
    parts = far.home / "state" / "hub"
    eventually(lambda: any(p.stat().st_size > 60_000 for p in parts.rglob("*.part")))
    far.kill()
    with pytest.raises(grpc.RpcError):
        list(stream)
    far.again()
    assert far.updates(request)[-1].dataset.stats.rows == {"train": 3000}
    assert [e["range"] for e in hub.log("GET /lfs/")][-1].startswith("bytes=")
