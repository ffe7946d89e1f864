"""The daemon's small rooms: what is wanted, who watches, the lease that several engines share."""

from __future__ import annotations

import pathlib
import signal
import sqlite3
import subprocess
import sys
from contextlib import aclosing

from qlorad.v1 import inference_pb2
from services.common import devices, idempotency
from services.common.store import Store
from services.inference import wanted
from services.inference.adapters import ABSENT, FETCHING, HOST, Moment, Table
from services.inference.leases import SharedLease
from services.inference.wanted import Default, Memory, Wanted, WantedAdapter
from services.inference.watching import Watching
from tests.house import ROOT, eventually

MIGRATIONS = (idempotency.MIGRATION, wanted.MIGRATION, wanted.SEVERAL)


def model(name: str) -> inference_pb2.LoadedModel:
    return inference_pb2.LoadedModel(model=f"models/{name}", digest=f"sha256:{name}")


async def test_what_one_base_left_is_taken_up_where_there_may_be_several(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "inference.sqlite"
    await Store.open(path, MIGRATIONS[:2]).close()
    db = sqlite3.connect(path)
    with db:
        db.execute("INSERT INTO wanted_model VALUES (1, ?, 'sha256:ada')", (model("one").SerializeToString(),))
        db.execute("INSERT INTO wanted_adapters VALUES ('sha256:bob', 'adapters/bob', 1)")
        db.execute("INSERT INTO wanted_adapters VALUES ('sha256:ada', 'adapters/ada', 0)")
    db.close()
    store = Store.open(path, MIGRATIONS)
    assert await store.run(wanted.read) == Wanted(
        (model("one"),),
        tuple(WantedAdapter(f"sha256:{name}", f"adapters/{name}", "sha256:one") for name in ("ada", "bob")),
        Default("adapters/sha256:ada", "sha256:ada", "sha256:one"),
    )  # fmt: skip
    await store.close()


async def test_what_is_wanted_is_there_again_with_pins_and_default(tmp_path: pathlib.Path) -> None:
    store = Store.open(tmp_path / "inference.sqlite", MIGRATIONS)
    memory = Memory(store)
    await memory.begin()
    assert memory.now == Wanted()
    pinned = model("two")
    pinned.pinned = True
    for base in (model("one"), pinned):
        memory.become(memory.now.with_base(base))
    for digest, base in (("sha256:ada", "sha256:one"), ("sha256:eve", "sha256:two")):
        memory.become(
            memory.now.with_adapter(WantedAdapter(digest, f"adapters/{digest[7:]}", base, digest > "sha256:b"))
        )
    memory.become(memory.now.switched(Default("adapters/best", "sha256:eve", "sha256:two")))
    await memory.end()
    again = Memory(store)
    await again.begin()
    assert again.now == memory.now
    assert again.now.bases[1].pinned and again.now.adapters[1].pinned
    assert again.now.made_room("sha256:eve").default.name == "adapters/best", "what makes room stays the default"
    assert again.now.without_adapter("sha256:eve").default == Default()
    assert again.now.without_base("sha256:two") == Wanted((model("one"),), again.now.adapters[:1])
    await store.close()


def arrived(table: Table, digest: str, base: str = "sha256:b") -> Table:
    table = table.asked(digest, f"adapters/{digest[7:]}", base).fetching(digest).verifying(digest)
    table = table.arrived(digest, Moment(1, 1), rank=4, memory_bytes=9, load_seconds=0.1, probe_effect=1.0)
    return table.gave_up(digest)


async def test_a_watcher_hears_everything_first_and_then_the_newest_of_each() -> None:
    watching, table = Watching(), arrived(Table(), "sha256:ada")
    async with aclosing(watching.watch(table.listed(""))) as said:
        first = await anext(said)
        assert (first.adapter.adapter, first.sequence, first.snapshot_end) == ("adapters/ada", 1, True)
        for _ in range(1000):  # a reader that reads nothing meanwhile
            for step in (
                table.asked("sha256:bob", "adapters/bob", "sha256:b"),
                table.asked("sha256:bob", "adapters/bob", "sha256:b").fetching("sha256:bob"),
                arrived(table, "sha256:bob"),
                table,
            ):
                watching.changed(table, step, "", "")
                watching.changed(step, arrived(table, "sha256:bob"), "", "")
                watching.changed(arrived(table, "sha256:bob"), table, "", "")
        both = arrived(table, "sha256:bob")
        watching.changed(table, both, "", "")
        watching.changed(both, both, "", "sha256:ada")
        pinned = both.pinned("sha256:bob")
        watching.changed(both, pinned, "sha256:ada", "sha256:ada")
        seen = [await anext(said) for _ in range(2)]
        assert [(m.sequence, m.adapter.adapter, m.adapter.state, m.adapter.is_default) for m in seen] == [
            (2, "adapters/ada", HOST, True), (3, "adapters/bob", HOST, False),
        ], "each once, in the order of the newest changes"  # fmt: skip
        assert seen[1].adapter.pinned
        busy = both.asked("sha256:bob", "adapters/bob", "sha256:b")
        busy = busy.granted("sha256:bob", Moment(2, 2)).gave_up("sha256:bob")
        watching.changed(both, busy, "sha256:ada", "sha256:ada")
        watching.changed(busy, busy.lost("sha256:b"), "sha256:ada", "sha256:ada")
        gone = [await anext(said) for _ in range(2)]
        assert {m.adapter.digest: m.adapter.state for m in gone} == {"sha256:ada": ABSENT, "sha256:bob": ABSENT}
        assert all(not m.adapter.memory_bytes and not m.adapter.is_default for m in gone)
        watching.end()
        assert [m async for m in said] == []


async def test_a_frozen_watcher_costs_no_more_however_many_come_and_go() -> None:
    watching, table = Watching(), arrived(arrived(Table(), "sha256:ada"), "sha256:bob")
    async with aclosing(watching.watch(table.listed(""))) as said:
        first = await anext(said)  # and no more: bob is still to be told
        assert first.adapter.digest == "sha256:ada" and not first.snapshot_end
        for number in range(3000):
            here = arrived(table, f"sha256:{number}")
            watching.changed(table, here, "", "")
            watching.changed(here, table, "", "")
        watching.changed(table, Table(), "", "")
        watching.changed(Table(), arrived(Table(), "sha256:new"), "", "")
        watching.end()
        rest = [message.adapter async for message in said]
    newest = {adapter.digest: adapter.state for adapter in rest}
    assert len(rest) < 1100
    assert {d: newest[d] for d in ("sha256:ada", "sha256:bob", "sha256:new")} == {
        "sha256:ada": ABSENT, "sha256:bob": ABSENT, "sha256:new": HOST,
    }  # fmt: skip


async def test_a_watcher_of_nothing_hears_that_and_states_on_the_way_are_told() -> None:
    watching = Watching()
    async with aclosing(watching.watch([])) as said:
        first = await anext(said)
        assert first.snapshot_end and not first.HasField("adapter") and first.sequence == 1
        asked = Table().asked("sha256:bob", "adapters/bob", "sha256:b")
        watching.changed(Table(), asked, "", "")
        watching.changed(asked, asked.fetching("sha256:bob"), "", "")
        assert (await anext(said)).adapter.state == FETCHING


HOLDS = "import os, sys; sys.stdin.read()"


def holder(fd: int) -> subprocess.Popen[bytes]:
    """A process that has the lease's file open, as an engine has."""
    return subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, pass_fds=[fd])


async def test_several_engines_hold_one_lease_and_the_last_one_takes_it_along(tmp_path: pathlib.Path) -> None:
    shared = SharedLease(tmp_path, "cpu")
    first = holder((await shared.take("a", "models/a", 100)).fd)
    second = holder((await shared.take("b", "models/b", 10)).fd)
    shared.tell("a", "models/a", 111)
    assert devices.holder(tmp_path, "cpu") == ("inference engines: models/a, models/b", 121)
    try:
        first.kill()
        first.wait()
        shared.give("a")
        assert devices.holder(tmp_path, "cpu") == ("inference engine: models/b", 10)
        second.kill()
        second.wait()
        assert devices.holder(tmp_path, "cpu") is not None, "the daemon has not seen it yet"
        shared.give("b")
        shared.give("b")
        assert devices.holder(tmp_path, "cpu") is None
        for name in "abcdefgh":
            await shared.take(name, f"models/sha256:{name * 64}", 1)
        assert devices.holder(tmp_path, "cpu") == (
            "inference engines: " + ", ".join(f"models/sha256:{n * 64}" for n in "abc") + " and 5 more", 8,
        )  # fmt: skip
    finally:
        for name in "abcdefgh":
            shared.give(name)
        for process in (first, second):
            process.kill()
            process.communicate()


DAEMON = """
import asyncio, pathlib, signal, subprocess, sys
from services.inference.leases import SharedLease
async def main():
    shared = SharedLease(pathlib.Path(sys.argv[1]), "cpu")
    for key in "ab":
        fd = (await shared.take(key, f"models/{key}", 1)).fd
        # As an engine does: it ends when the daemon's socket closes.
        subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[fd])
    print("ready", flush=True)
    signal.pause()
asyncio.run(main())
"""


def test_a_killed_daemon_leaves_a_free_device_once_its_engines_have_ended(tmp_path: pathlib.Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    assert daemon.stdout is not None and daemon.stdout.readline() == b"ready\n"
    assert devices.holder(tmp_path, "cpu") is not None
    daemon.send_signal(signal.SIGKILL)
    daemon.communicate()
    eventually(lambda: devices.holder(tmp_path, "cpu") is None, seconds=20, what="a free device")
