"""Workers: bounded, without the daemon's secrets, gone when the socket closes."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from services.common import frames, process
from services.common.process import Limits
from tests.house import eventually

ECHO = "tests.common.echo"


async def ask(talk: process.Talk, what: str) -> str | None:
    talk.writer.write(frames.pack(what.encode()))
    await talk.writer.drain()
    body = await talk.receive()
    return None if body is None else body.decode()


async def test_a_worker_answers_and_ends_with_its_socket(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log")
    assert await ask(talk, "say hello") == "hello"
    assert os.getpgid(talk.process.pid) == talk.process.pid
    assert await talk.close() == 0


async def test_a_worker_that_does_not_listen_is_killed(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log")
    assert await ask(talk, "deaf") == "deaf"
    assert await talk.close(grace_seconds=0.2) == -signal.SIGKILL
    assert process.exit_story(-9) == "was ended by SIGKILL"


async def test_secrets_are_not_inherited(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "SOME_API_KEY", "AWS_CREDENTIALS"):
        monkeypatch.setenv(name, "canary-4711")
    monkeypatch.setenv("HARMLESS", "stays")
    talk = await process.start_talk(ECHO, tmp_path / "log", environ={"GIVEN": "too"})
    told = await ask(talk, "environ") or ""
    assert "canary-4711" not in told and "HARMLESS=stays" in told and "GIVEN=too" in told
    assert "HF_HUB_OFFLINE=1" in told and "OMP_WAIT_POLICY=PASSIVE" in told
    await talk.close()


async def test_memory_is_bounded(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log", limits=Limits(memory_bytes=512 << 20))
    assert await ask(talk, "memory 100") == "ok"
    assert await ask(talk, "memory 2000") == "MemoryError"
    await talk.close()


async def test_cpu_time_is_bounded(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log", limits=Limits(cpu_seconds=1))
    assert await ask(talk, "spin") is None
    assert await talk.close() == -signal.SIGXCPU


async def test_a_crash_is_none_and_its_last_words_are_kept(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log")
    assert await ask(talk, "crash") is None
    assert await talk.close() == 3
    assert process.tail(talk.log).endswith("last words\n")
    assert len(process.tail(talk.log, limit=5)) == 5
    assert process.tail(tmp_path / "none") == ""
    assert process.exit_story(3) == "ended with exit code 3" and process.exit_story(None) == "still runs"


async def test_a_bad_frame_counts_as_gone(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log")
    assert await ask(talk, "garbage") is None
    await talk.close()


async def test_only_named_descriptors_are_inherited(tmp_path: pathlib.Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        talk = await process.start_talk(ECHO, tmp_path / "log")
        told = await ask(talk, "descriptors") or ""
        assert str(tmp_path) not in [line.split(" ", 1)[1] for line in told.splitlines()]
        await talk.close()
    finally:
        os.close(fd)


async def test_killing_takes_the_whole_group(tmp_path: pathlib.Path) -> None:
    talk = await process.start_talk(ECHO, tmp_path / "log")
    grandchild = int(await ask(talk, "fork") or 0)
    process.kill(talk.process.pid)
    await talk.process.wait()
    eventually(lambda: not pathlib.Path(f"/proc/{grandchild}/cmdline").exists() or zombie(grandchild), 10, "its end")
    process.kill(talk.process.pid)  # gone already: silent
    await talk.close()


def zombie(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
