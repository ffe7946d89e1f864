"""The test hub against the real client library: what it reads, the server says."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.kit import Server, serving

ROWS = b'{"text": "one"}\n' * 50
TABLE = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        server.put("lab/notes", {"README.md": b"# Notes\n", "data/train.jsonl": ROWS, "data/big.parquet": TABLE})
        server.put("lab/notes", {"README.md": b"# Old\n"}, revision="v1")
        server.put("lab/tiny", {"config.json": b"{}", "model.safetensors": TABLE}, kind="models")
        server.put("lab/gated", {"a.jsonl": ROWS}, gated=True, token="open-sesame")
        server.put("lab/secret", {"a.jsonl": ROWS}, private=True, token="open-sesame")
        yield server


def test_info_and_tree(hub: Server) -> None:
    api = HfApi(endpoint=hub.url, token=False)
    info = api.dataset_info("lab/notes", files_metadata=True)
    sizes = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in info.siblings or []}
    assert sizes["data/train.jsonl"] == (len(ROWS), None)
    assert sizes["data/big.parquet"][0] == len(TABLE) and len(str(sizes["data/big.parquet"][1])) == 64
    assert api.dataset_info("lab/notes", revision=info.sha).sha == info.sha
    assert api.dataset_info("lab/notes", revision="v1").sha != info.sha
    assert [f.path for f in api.list_repo_tree("lab/notes", repo_type="dataset")] == ["README.md", "data"]
    deep = [f.path for f in api.list_repo_tree("lab/notes", "data", repo_type="dataset", recursive=True)]
    assert deep == ["data/big.parquet", "data/train.jsonl"]
    assert api.model_info("lab/tiny").id == "lab/tiny"
    found = api.get_paths_info("lab/notes", ["README.md", "none"], repo_type="dataset")
    assert [f.path for f in found] == ["README.md"]


def test_tree_comes_in_pages(hub: Server) -> None:
    hub.put("lab/many", {f"f{i:03d}.txt": b"x" for i in range(25)})
    url = f"{hub.url}/api/datasets/lab/many/tree/main?limit=10"
    seen = []
    while url:
        page = httpx2.get(url)
        seen += [e["path"] for e in page.json()]
        url = page.links.get("next", {}).get("url", "")
    assert seen == [f"f{i:03d}.txt" for i in range(25)]


def test_downloads_with_redirect_to_the_store(hub: Server, tmp_path: pathlib.Path) -> None:
    path = hf_hub_download(
        "lab/notes", "data/big.parquet", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path, token="any"
    )
    assert pathlib.Path(path).read_bytes() == TABLE
    assert [e["has_token"] for e in hub.log("/lfs/")] == [False]
    whole = snapshot_download("lab/tiny", endpoint=hub.url, local_dir=tmp_path / "tiny", token=False)
    assert (pathlib.Path(whole) / "model.safetensors").read_bytes() == TABLE


@pytest.mark.slow  # the library waits a second before it goes on
def test_a_cut_is_resumed_by_the_library(hub: Server, tmp_path: pathlib.Path) -> None:
    hub.clear()
    hub.order("cut", "GET /lfs/", after=30_000)
    path = hf_hub_download(
        "lab/notes", "data/big.parquet", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path, token=False
    )
    assert pathlib.Path(path).read_bytes() == TABLE
    assert [e["sent"] for e in hub.log("GET /lfs/")] == [30_000, len(TABLE)]


@pytest.mark.parametrize(
    ("repo", "revision", "file", "token", "error"),
    [
        ("lab/none", "main", "a.jsonl", "any", RepositoryNotFoundError),
        ("lab/notes", "v9", "a.jsonl", False, RevisionNotFoundError),
        ("lab/notes", "main", "none.jsonl", False, EntryNotFoundError),
        ("lab/gated", "main", "a.jsonl", False, GatedRepoError),
        ("lab/gated", "main", "a.jsonl", "wrong", GatedRepoError),
        ("lab/secret", "main", "a.jsonl", "wrong", RepositoryNotFoundError),
    ],
)
def test_refusals(
    hub: Server, tmp_path: pathlib.Path, repo: str, revision: str, file: str, token: str | bool, error: type[Exception]
) -> None:
    with pytest.raises(error):
        hf_hub_download(
            repo, file, repo_type="dataset", revision=revision, endpoint=hub.url, cache_dir=tmp_path, token=token
        )


def test_a_token_opens(hub: Server, tmp_path: pathlib.Path) -> None:
    for repo in ("lab/gated", "lab/secret"):
        path = hf_hub_download(
            repo, "a.jsonl", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path, token="open-sesame"
        )
        assert pathlib.Path(path).read_bytes() == ROWS


def test_ranges(hub: Server) -> None:
    url = f"{hub.url}/datasets/lab/notes/resolve/main/data/train.jsonl"
    etag = httpx2.head(url).headers["ETag"]
    for asked, status, body in (
        ("bytes=10-19", 206, ROWS[10:20]),
        ("bytes=790-", 206, ROWS[790:]),
        ("bytes=-5", 206, ROWS[-5:]),
        (f"bytes={len(ROWS)}-", 416, b""),
    ):
        answer = httpx2.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (status, body)
    assert httpx2.get(url, headers={"Range": "bytes=10-", "If-Range": etag}).status_code == 206
    assert httpx2.get(url, headers={"Range": "bytes=10-", "If-Range": '"other"'}).content == ROWS


def test_faults_strike_as_often_as_ordered(hub: Server) -> None:
    hub.clear()
    url = f"{hub.url}/datasets/lab/notes/resolve/main/data/train.jsonl"
    hub.order("throttle", "train.jsonl", retry_after="7", times=2)
    hub.order("wrong_bytes", "train.jsonl")
    answers = [httpx2.get(url) for _ in range(4)]
    assert [a.status_code for a in answers] == [429, 429, 200, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert answers[2].content != ROWS and answers[3].content == ROWS
    assert hub.left() == []
    with pytest.raises(httpx2.RemoteProtocolError):
        hub.order("drop", "train.jsonl")
        httpx2.get(url)
