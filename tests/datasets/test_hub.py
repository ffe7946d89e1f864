"""Datasets of a hub: fetched whole, whatever the wire does; refused by name where they cannot be."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pathlib
import random
import re
import time
from collections.abc import Iterator

import pytest

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.config import ConfigError
from services.common.errors import Fault
from services.datasets.app import Config
from services.datasets.fetches import KEEP_SECONDS
from services.datasets.worker.hub import Patience, Repository
from tests.datasets.fetching import Bench, contents, workers_running
from tests.datasets.kit import jsonl, numbered
from tests.house import eventually
from tests.hub.kit import Server, serving

ROWS = jsonl(numbered(500))
BIG = random.Random(5).randbytes(3_000_000)
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n# Notes\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        server.put("lab/notes", {"README.md": CARD, "data/b.jsonl": ROWS * 2, "data/a.jsonl": ROWS, "x.csv": b"a\n"})
        server.put("lab/notes", {"rows.jsonl": ROWS}, revision="v1")
        server.put("lab/big", {"train.jsonl.gz": BIG, "test.jsonl.gz": b"small"})
        server.put("lab/gated", {"a.jsonl": ROWS}, gated=True, token="open-sesame")
        server.put("lab/secret", {"a.jsonl": ROWS}, private=True, token="open-sesame")
        server.put("lab/script", {"script.py": b"raise SystemExit", "README.md": b"# Run me\n"})
        yield server


@pytest.fixture
def bench(hub: Server, tmp_path: pathlib.Path) -> Bench:
    hub.clear()
    return Bench(tmp_path, hub.url)


async def test_a_dataset_comes_with_its_commit_and_digests(hub: Server, bench: Bench) -> None:
    done = await bench.hub("lab/notes")
    assert re.fullmatch(r"hub:lab/notes@[0-9a-f]{40}", done.source)
    assert [(s.filename, s.split) for s in done.sources] == [("data/a.jsonl", "train"), ("data/b.jsonl", "train")]
    assert contents(done) == {"data/a.jsonl": ROWS, "data/b.jsonl": ROWS * 2}
    assert [s.sha256 for s in done.sources] == [hashlib.sha256(ROWS * n).hexdigest() for n in (1, 2)]
    assert all(pathlib.Path(s.path).is_relative_to(bench.state) for s in done.sources)
    assert bench.told[-1][0] == "fetch" and bench.told[-1][2] == 3 * len(ROWS)
    # Again: one look at what the revision is now, and nothing that is here already.
    hub.clear()
    assert await bench.hub("lab/notes") == done
    assert [e["path"].partition("?")[0] for e in hub.log()] == ["/api/datasets/lab/notes/revision/main"]


def test_revisions_splits_and_patterns(bench: Bench) -> None:
    assert contents(bench.here("lab/notes", revision="v1")) == {"rows.jsonl": ROWS}
    assert list(contents(bench.here("lab/big", splits=["test"]))) == ["test.jsonl.gz"]
    assert list(contents(bench.here("lab/notes", files=["*.csv"]))) == ["x.csv"]


async def test_cuts_and_other_faults(hub: Server, bench: Bench) -> None:
    hub.order("status", "GET /api", status=503)
    hub.order("throttle", "GET /api", retry_after="0")
    hub.order("drop", "GET .*/resolve/", times=1)
    hub.order("cut", "GET /lfs/.*train", after=1_000_000)
    done = await bench.hub("lab/big")
    assert contents(done) == {"train.jsonl.gz": BIG, "test.jsonl.gz": b"small"}
    assert hub.left() == []
    asked = hub.log("GET /lfs/")
    assert sum(e["sent"] for e in asked) == len(BIG) + len(b"small")  # no byte twice
    assert not any(e["has_token"] for e in asked)


def test_twenty_cuts(hub: Server, bench: Bench, tmp_path: pathlib.Path) -> None:
    chance = random.Random(7)
    for _ in range(20):
        hub.order("cut", "GET /lfs/.*train", after=chance.randrange(1, 150_000))
    repository = Repository(hub.url, "", "lab/big", "main", Patience(first_seconds=0.0))
    commit, entries = repository.listing()
    path, sha256 = repository.bring(entries["train.jsonl.gz"], commit, tmp_path, lambda _: None)
    assert path.read_bytes() == BIG and sha256 == hashlib.sha256(BIG).hexdigest()
    assert hub.left() == [] and sum(e["sent"] for e in hub.log("GET /lfs/")) == len(BIG)


@pytest.mark.slow  # test_sources kills the whole daemon
async def test_a_killed_worker_costs_nothing_that_was_there(hub: Server, bench: Bench) -> None:
    hub.order("slow", "GET /lfs/.*train", after=200_000, seconds=0.1)
    begun = asyncio.create_task(bench.hub("lab/big"))

    def half_there() -> bool:
        return any(p.stat().st_size > 400_000 for p in bench.state.rglob("*.part"))

    await asyncio.to_thread(eventually, half_there)
    for worker in workers_running():
        worker.kill()
    with pytest.raises(Fault) as caught:
        await begun
    assert caught.value.reason == errors_pb2.REASON_WORKER_LOST
    assert contents(await bench.hub("lab/big"))["train.jsonl.gz"] == BIG
    last = hub.log("GET /lfs/")
    assert any(int(e["range"].removeprefix("bytes=").rstrip("-") or 0) > 400_000 for e in last if e["range"])


def test_other_bytes_than_listed(hub: Server, bench: Bench) -> None:
    hub.order("wrong_bytes", "GET .*a.jsonl")
    fault = bench.refused_here("lab/notes")
    assert fault.reason == errors_pb2.REASON_CORRUPT and "data/a.jsonl" in fault.message
    assert not list(bench.state.rglob("*.part"))
    # What a broken disk left behind is fetched anew; so is a part that does not fit.
    done = bench.here("lab/notes")
    kept = pathlib.Path(done.sources[0].path)
    kept.write_bytes(ROWS[:-1] + b"?")
    assert contents(bench.here("lab/notes"))["data/a.jsonl"] == ROWS
    kept.rename(f"{kept}.part")
    pathlib.Path(f"{kept}.part").write_bytes(b"x" * 1000)
    assert contents(bench.here("lab/notes"))["data/a.jsonl"] == ROWS


def test_a_server_without_ranges(hub: Server, bench: Bench) -> None:
    hub.order("cut", "GET .*a.jsonl", after=5000)
    hub.order("no_range", "GET .*a.jsonl")
    assert contents(bench.here("lab/notes"))["data/a.jsonl"] == ROWS


def test_what_there_is_not(hub: Server, bench: Bench) -> None:
    for repo, fields, word in (
        ("lab/none", {}, "or is private"),
        ("lab/secret", {}, "--hub-token-file"),
        ("lab/notes", {"revision": "v9"}, "'v9'"),
        ("lab/notes", {"config": "other"}, "there is: 'default'"),
        ("lab/notes", {"splits": ["test"]}, "there is: 'train'"),
        ("lab/notes", {"files": ["*.parquet"]}, "'data/a.jsonl'"),
    ):
        fault = bench.refused_here(repo, **fields)
        assert (fault.reason, fault.resource) == (errors_pb2.REASON_NOT_FOUND, repo) and word in fault.message
    fault = bench.refused_here("lab/script")
    assert fault.reason == errors_pb2.REASON_INVALID_REQUEST and "'script.py'; scripts are never run" in fault.message


def test_gated_and_private(hub: Server, bench: Bench) -> None:
    fault = bench.refused_here("lab/gated")
    assert fault.reason == errors_pb2.REASON_PERMISSION_DENIED and "a token is needed" in fault.message
    bench.token = "wrong"
    fault = bench.refused_here("lab/gated")
    assert fault.reason == errors_pb2.REASON_PERMISSION_DENIED and "has no access" in fault.message
    bench.token = "open-sesame"
    assert contents(bench.here("lab/secret")) == {"a.jsonl": ROWS}


async def test_the_token_stays_a_secret(hub: Server, bench: Bench) -> None:
    bench.token = "open-sesame"
    hub.order("throttle", "GET /api", retry_after="0")
    assert contents(await bench.hub("lab/gated")) == {"a.jsonl": ROWS}
    logs = "".join(p.read_text() for p in (bench.home / "logs").iterdir())
    kept = b"".join(p.read_bytes() for p in bench.state.rglob("*") if p.is_file())
    assert "open-sesame" not in logs and b"open-sesame" not in kept


async def test_a_hub_that_asks_for_patience(hub: Server, bench: Bench) -> None:
    hub.order("throttle", "GET /api", retry_after="3600")
    fault = await bench.refused("lab/notes")
    assert (fault.reason, fault.retry_seconds) == (errors_pb2.REASON_UPSTREAM, 3600)


def test_bounds_and_listings_that_lie(hub: Server, bench: Bench) -> None:
    bench.max_bytes = 2 * len(ROWS)
    fault = bench.refused_here("lab/notes")
    assert fault.reason == errors_pb2.REASON_TOO_LARGE and str(3 * len(ROWS)) in fault.message
    blob = {"size": 3, "blobId": "0" * 40}
    for path, reason in (
        ("../../../outside.jsonl", errors_pb2.REASON_INVALID_REQUEST),
        ("/etc/x.jsonl", errors_pb2.REASON_INVALID_REQUEST),
        ("a\u0000b.jsonl", errors_pb2.REASON_INVALID_REQUEST),
        (7, errors_pb2.REASON_INVALID_REQUEST),
    ):
        told = {"id": "lab/notes", "sha": "1" * 40, "siblings": [{"rfilename": path, **blob}]}
        hub.order("body", "GET /api", body=json.dumps(told))
        assert bench.refused_here("lab/notes").reason == reason
    for body in ("[]", '{"id": "x"}', "<html>", '{"id": "x", "sha": "../..", "siblings": []}',
                 json.dumps({"id": "x", "sha": "1" * 40, "siblings": [{"rfilename": "a.jsonl", "size": 3,
                                                                     "blobId": "../../../../outside"}]})):  # fmt: skip
        hub.order("body", "GET /api", body=body)
        assert bench.refused_here("lab/notes").reason == errors_pb2.REASON_UPSTREAM
    bench.max_bytes = 1 << 62
    vast = {"rfilename": "a.jsonl", "size": 1 << 61, "blobId": "0" * 40}
    hub.order("body", "GET /api", body=json.dumps({"id": "x", "sha": "1" * 40, "siblings": [vast]}))
    assert bench.refused_here("lab/notes").reason == errors_pb2.REASON_DISK_FULL
    # More than it listed: three bytes were announced.
    told = {"id": "x", "sha": "1" * 40, "siblings": [{"rfilename": "a.jsonl", **blob}]}
    hub.order("body", "GET /api", body=json.dumps(told))
    hub.order("body", "GET .*/resolve/", body="more than three")
    fault = bench.refused_here("lab/notes")
    assert fault.reason == errors_pb2.REASON_CORRUPT and "more than 3 bytes" in fault.message
    outside = [p for p in bench.home.rglob("*") if "outside" in p.name]
    assert outside == []


def test_patience_ends(hub: Server, tmp_path: pathlib.Path) -> None:
    hub.clear()
    few = Patience(tries=3, first_seconds=0.0)
    repository = Repository(hub.url, "", "lab/notes", "main", few)
    hub.order("status", "GET /api", status=500, times=9)
    with pytest.raises(Fault, match="status 500, 3 times") as caught:
        repository.listing()
    assert caught.value.reason == errors_pb2.REASON_UPSTREAM and caught.value.retry_seconds == 30
    hub.clear()
    commit, entries = repository.listing()
    hub.order("cut", "GET .*a.jsonl", after=0, times=9)
    with pytest.raises(Fault, match="3 times; what was fetched is kept"):
        repository.bring(entries["data/a.jsonl"], commit, tmp_path, lambda _: None)
    # With a byte each time it goes on, but not for ever.
    hub.clear()
    patient = Repository(hub.url, "", "lab/notes", "main", Patience(tries=3, cuts=6, first_seconds=0.0))
    hub.order("cut", "GET .*a.jsonl", after=1, times=9)
    with pytest.raises(Fault, match="6 times"):
        patient.bring(entries["data/a.jsonl"], commit, tmp_path, lambda _: None)
    nobody = Repository("http://127.0.0.1:1", "", "lab/notes", "main", few)
    with pytest.raises(Fault, match="does not answer") as caught:
        nobody.listing()
    assert caught.value.reason == errors_pb2.REASON_UPSTREAM


@pytest.mark.slow
async def test_two_calls_for_one_repository_fetch_once(hub: Server, bench: Bench) -> None:
    fetches = bench.fetches()
    request = datasets_pb2.CreateDatasetRequest(hub=datasets_pb2.HubSource(repo="lab/big"))
    one, two = await asyncio.gather(*(fetches.fetch(request, lambda *_: None) for _ in range(2)))
    assert one == two and len(hub.log("GET /lfs/")) == 2


def test_a_token_goes_over_no_open_wire(tmp_path: pathlib.Path) -> None:
    token = tmp_path / "token"
    token.write_text("open-sesame")
    for endpoint in ("https://hub.example", "http://127.0.0.1:80", "http://localhost"):
        assert Config(hub_endpoint=endpoint, hub_token_file=str(token)).hub_endpoint == endpoint
    assert Config(hub_endpoint="http://hub.example").hub_token_file == ""
    with pytest.raises(ConfigError, match="--hub-token-file"):
        Config(hub_endpoint="http://hub.example", hub_token_file=str(token))


async def test_sweep(bench: Bench) -> None:
    await bench.hub("lab/notes")
    (kept,) = bench.state.iterdir()
    await bench.fetches().sweep()
    assert kept.exists()
    week = time.time() - KEEP_SECONDS - 60
    os.utime(kept, (week, week))
    await bench.hub("lab/big", splits=["test"])
    assert not kept.exists() and len(list(bench.state.iterdir())) == 1
