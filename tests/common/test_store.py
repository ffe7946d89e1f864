"""What SQLite was told stays told; what failed left nothing; a request_id is answered once."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common import idempotency
from services.common.config import ConfigError
from services.common.errors import Fault
from services.common.store import Store
from tests.house import ROOT

THINGS = "CREATE TABLE things (name TEXT PRIMARY KEY, size INTEGER)"
MORE = "ALTER TABLE things ADD COLUMN note TEXT; CREATE INDEX by_size ON things (size)"


def names(db: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in db.execute("SELECT name FROM things ORDER BY name")]


async def test_migrations_run_once_in_order(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state" / "x.sqlite"
    store = Store.open(path, [THINGS])
    await store.run(lambda db: db.execute("INSERT INTO things VALUES ('a', 1)"))
    await store.close()
    for _ in range(2):
        store = Store.open(path, [THINGS, MORE])
        assert await store.run(lambda db: tuple(db.execute("SELECT * FROM things").fetchone())) == ("a", 1, None)
        assert await store.run(lambda db: db.execute("PRAGMA user_version").fetchone()[0]) == 2
        await store.close()


async def test_a_failed_migration_leaves_the_old_format(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.sqlite"
    await Store.open(path, [THINGS]).close()
    with pytest.raises(ConfigError, match="no such table"):
        Store.open(path, [THINGS, "CREATE TABLE more (a); INSERT INTO absent VALUES (1)"])
    store = Store.open(path, [THINGS])
    assert await store.run(lambda db: db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 2
    await store.close()


async def test_a_newer_format_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.sqlite"
    await Store.open(path, [THINGS, MORE]).close()
    with pytest.raises(ConfigError, match="newer qlorad: format 2; accepted: up to 1"):
        Store.open(path, [THINGS])


def test_what_is_no_database_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"x\.sqlite cannot be opened"):
        Store.open(path, [THINGS])


async def test_a_transaction_is_all_or_nothing(tmp_path: pathlib.Path) -> None:
    store = Store.open(tmp_path / "x.sqlite", [THINGS])

    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO things VALUES ('a', 1)")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        await store.run(half)
    assert await store.run(names) == []
    with pytest.raises(sqlite3.IntegrityError):
        await store.run(lambda db: [db.execute("INSERT INTO things VALUES ('b', 1)") for _ in range(2)])
    assert await store.run(names) == []
    await store.close()


async def test_a_caller_who_gives_up_tears_nothing(tmp_path: pathlib.Path) -> None:
    store = Store.open(tmp_path / "x.sqlite", [THINGS])
    for number in range(20):
        work = asyncio.create_task(
            store.run(lambda db, n=number: [db.execute("INSERT INTO things VALUES (?, 1)", (f"{n}{s}",)) for s in "ab"])
        )
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    kept = await store.run(names)
    assert len(kept) == 40
    await store.close()


WRITER = """
import asyncio, pathlib, sys
from services.common.store import Store
async def main():
    store = Store.open(pathlib.Path(sys.argv[1]), [sys.argv[2]])
    for n in range(100000):
        await store.run(lambda db: db.execute("INSERT INTO things VALUES (?, 1)", (f"{n:06}",)))
        print(n, flush=True)
asyncio.run(main())
"""


def test_what_was_answered_survives_kill_9(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), THINGS], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert writer.stdout is not None
    for _ in range(30):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    told = 30 + len([line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")])
    writer.wait(30)
    writer.stdout.close()
    kept = asyncio.run(read_all(path))
    assert kept == [f"{n:06}" for n in range(len(kept))] and len(kept) >= told >= 30


async def read_all(path: pathlib.Path) -> list[str]:
    store = Store.open(path, [THINGS])
    try:
        return await store.run(names)
    finally:
        await store.close()


FULL = """
import asyncio, pathlib, os
from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.store import Store
async def main():
    store = Store.open(pathlib.Path("x.sqlite"), ["CREATE TABLE things (name TEXT)"])
    kept = 0
    count = lambda db: db.execute("SELECT count(*) FROM things").fetchone()[0]
    for n in range(1000):
        try:
            await store.run(lambda db: db.execute("INSERT INTO things VALUES (?)", ("x" * 20000,)))
            kept += 1
        except Fault as fault:
            assert fault.reason == errors_pb2.REASON_DISK_FULL
            break
    else:
        raise SystemExit("the disk was not full")
    for _ in range(3):
        try:
            await store.run(lambda db: db.execute("INSERT INTO things VALUES (?)", ("x" * 200000,)))
        except Fault as fault:
            assert fault.reason == errors_pb2.REASON_DISK_FULL
    assert await store.run(count) == kept
    pathlib.Path("filler").unlink()
    await store.run(lambda db: db.execute("INSERT INTO things VALUES ('y')"))
    assert await store.run(count) == kept + 1
    assert await store.run(lambda db: db.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
    await store.close()
pathlib.Path("filler").write_bytes(b"x" * 500_000)
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a tmpfs needs root on Linux")
def test_a_full_disk_is_said_and_what_was_answered_stays(tmp_path: pathlib.Path) -> None:
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && cd {tmp_path} && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, FULL],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


async def test_a_request_id_is_answered_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.sqlite"
    request = trainer_pb2.CreateJobRequest(request_id="r1", job_id="a")
    other = trainer_pb2.CreateJobRequest(request_id="r1", job_id="b")
    body = idempotency.body_of(request)
    store = Store.open(path, [idempotency.MIGRATION])
    assert await store.run(lambda db: idempotency.recall(db, "CreateJob", "r1", body)) is None
    await store.run(lambda db: idempotency.note(db, "CreateJob", "r1", body, b"answer"))
    await store.close()
    store = Store.open(path, [idempotency.MIGRATION])
    assert await store.run(lambda db: idempotency.recall(db, "CreateJob", "r1", body)) == b"answer"
    assert await store.run(lambda db: idempotency.recall(db, "CancelJob", "r1", body)) is None
    with pytest.raises(Fault) as caught:
        await store.run(lambda db: idempotency.recall(db, "CreateJob", "r1", idempotency.body_of(other)))
    assert caught.value.reason == errors_pb2.REASON_REQUEST_ID_REUSED
    await store.run(lambda db: idempotency.prune(db))
    assert await store.run(lambda db: idempotency.recall(db, "CreateJob", "r1", body)) == b"answer"
    await store.run(lambda db: idempotency.prune(db, older_than_seconds=-1.0))
    assert await store.run(lambda db: idempotency.recall(db, "CreateJob", "r1", body)) is None
    await store.close()
