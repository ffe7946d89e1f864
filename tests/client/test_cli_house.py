"""`qlorad up`, `down`, `status`, `doctor`, `token`: real daemons, real kills."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import signal
import subprocess

import pytest

from tests.client.cli import Cli, up
from tests.house import eventually

NAMES = ["datasets", "registry", "trainer", "inference"]


def alive(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_up_serves_restarts_what_dies_and_down_ends_all(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    with up(home) as cli:
        told = cli.json("status")
        assert [d["service"] for d in told["daemons"]] == NAMES
        assert {d["health"] for d in told["daemons"]} == {"SERVING"}
        pids = {d["service"]: d["pid"] for d in told["daemons"]}
        before = cli.daemon("registry")

        os.kill(pids["registry"], signal.SIGKILL)
        after = eventually(
            lambda: (d := cli.daemon("registry"))["health"] == "SERVING" and d["pid"] != before["pid"] and d,
            seconds=30,
            what="the registry's return",
        )
        assert after["address"] == before["address"] and after["metrics"] == before["metrics"]
        assert cli.json("model", "list") == {"models": []}
        assert "SIGKILL" in (home / "logs" / "up.log").read_text()

        twice = cli.run("up", "--detach", code=1)
        assert f"is up already (pid {told['supervisor_pid']})" in twice.stderr
        assert cli.json("up", code=1)["error"]["reason"] == "WRONG_STATE"

        ended = cli.json("down")
        assert ended["ended"] == ["supervisor"]
        assert not any(alive(pid) for pid in (*pids.values(), after["pid"], told["supervisor_pid"]))
    assert cli.json("status", code=5)["supervisor_pid"] == 0
    assert "was not up" in cli.run("down").stdout


def test_up_in_the_foreground_ends_with_ctrl_c(tmp_path: pathlib.Path) -> None:
    cli = Cli(tmp_path / "home")
    process = cli.start("up", "--ports", "0")
    try:
        assert process.stderr is not None
        assert "Ctrl-C ends all four" in process.stderr.readline()
        pids = [cli.daemon(name)["pid"] for name in NAMES]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.count(" SERVING ") == 4 and err == ""
    assert not any(alive(pid) for pid in pids)


def test_daemons_left_by_a_killed_supervisor_are_named_and_ended(tmp_path: pathlib.Path) -> None:
    with up(tmp_path / "home") as cli:
        told = cli.json("status")
        os.kill(told["supervisor_pid"], signal.SIGKILL)
        eventually(lambda: not alive(told["supervisor_pid"]), 10, "its end")
        assert "run already, without `qlorad up`" in cli.run("up", "--detach", code=1).stderr
        assert sorted(cli.json("down")["ended"]) == sorted(NAMES)
        assert not any(alive(d["pid"]) for d in told["daemons"])


def test_down_never_ends_a_stranger(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    run = home / "state" / "run"
    run.mkdir(parents=True)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (run / "up.lock").write_text(str(stranger.pid))
        told = {"pid": stranger.pid, "address": "127.0.0.1:1", "metrics": "127.0.0.1:2", "tls": False, "token": False}
        (run / "trainer.json").write_text(json.dumps(told))
        cli = Cli(home)
        assert cli.json("down")["ended"] == []
        assert stranger.poll() is None
        # Even where something holds the daemon's lock, the process told must be one of ours.
        with (home / "state" / "trainer.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "cannot be told" in cli.run("down", code=1).stderr
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_daemon_that_cannot_start_is_told_with_its_reason(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.yaml").write_text("trainer:\n  no_such_setting: 1\n")
    told = Cli(home).run("up", "--detach", "--ports", "0", code=1)
    assert "no_such_setting" in told.stderr and "qlorad-trainer cannot start" in told.stderr
    assert Cli(home).json("status", code=5)["daemons"][0]["health"] == "DOWN"


def test_doctor_finds_the_machine_and_stale_traces(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    run = home / "state" / "run"
    run.mkdir(parents=True)
    (run / "registry.json").write_text("{}")
    checks = {c["check"]: c for c in Cli(home).json("doctor")["checks"]}
    assert checks["registry run file"]["mark"] == "warn"
    assert checks["qlorad-trainer"]["found"] == "DOWN"
    assert {"python", "cores", "memory", "disk", "home", "devices", "grpcio"} <= set(checks)
    assert checks["python"]["found"].startswith("3.")


def test_a_new_token_is_shown_once_with_its_line() -> None:
    told = Cli(pathlib.Path("/nowhere")).json("token", "new", "ana")
    assert told["token"].startswith("qlt_") and len(told["token"]) > 40
    assert told["tokens_file_line"] == f"{hashlib.sha256(told['token'].encode()).hexdigest()} ana"
    other = Cli(pathlib.Path("/nowhere")).run("token", "new").stdout.splitlines()
    assert other[0].startswith("qlt_") and other[0] != told["token"] and other[1].endswith(" me")


def test_a_token_opens_the_door_and_its_lack_is_exit_code_4(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    told = Cli(home).json("token", "new", "ana")
    (tmp_path / "tokens").write_text(told["tokens_file_line"] + "\n")
    (home / "config.yaml").write_text(f"all:\n  tokens_file: {tmp_path / 'tokens'}\n")
    with up(home, QLORAD_TOKEN=told["token"]) as cli:
        assert cli.json("model", "list") == {"models": []}
        for wrong in ("", "qlt_wrong"):
            refused = Cli(home, {"QLORAD_TOKEN": wrong}).json("model", "list", code=4)
            assert refused["error"]["code"] == "UNAUTHENTICATED"
        logs = "".join(p.read_text() for p in (home / "logs").glob("*.log"))
        assert told["token"] not in logs and "qlt_wrong" not in logs


@pytest.mark.parametrize("words", [("job", "list"), ("model", "starter"), ("dataset", "list"), ("job", "watch", "x")])
def test_who_is_not_there_is_exit_code_5(tmp_path: pathlib.Path, words: tuple[str, ...]) -> None:
    nobody = {f"QLORAD_{name.upper()}_ADDRESS": "127.0.0.1:1" for name in NAMES}
    told = Cli(tmp_path, nobody).json(*words, code=5)
    assert told["error"]["code"] == "UNAVAILABLE" and "TLS" in told["error"]["message"]
