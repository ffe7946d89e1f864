"""Ctrl-C while the daemon makes a dataset: who leaves is told what goes on, and comes back to it."""

from __future__ import annotations

import pathlib
import re
import signal
import socket
import threading
from collections.abc import Callable

from qlorad.cli.leaving import Making
from tests.client.cli import Cli
from tests.datasets.site import site
from tests.house import House, eventually

PAGE = b"# Rain\n\n## The gauge\n\nIt is read at seven every morning and written down.\n"


def left(cli: Cli, *words: str, at: str) -> tuple[str, str]:
    """Sends SIGINT to a command as soon as it tells a stage; what it says, and the request that it names."""
    process = cli.start(*words)
    try:
        assert process.stderr is not None
        while at not in (line := process.stderr.readline()):
            assert line, process.communicate()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, said
    return said, re.search(r"--request-id (\w+)", said)[1]  # type: ignore[index]


def test_who_leaves_is_told_what_goes_on_and_comes_back_to_it(
    home: pathlib.Path, house_factory: Callable[[pathlib.Path], House], tmp_path: pathlib.Path
) -> None:
    cli, go = Cli(home), threading.Event()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "rain.md").write_bytes(PAGE)
    docs = ("dataset", "from-docs", str(tmp_path / "notes"), "--model", "starter-test", "--validation", "0")

    def slow(sock: socket.socket) -> None:
        head = f"HTTP/1.1 200 x\r\nContent-Type: text/markdown\r\nContent-Length: {len(PAGE)}\r\n\r\n"
        sock.sendall(head.encode() + PAGE[:30])
        go.wait(60)
        sock.sendall(PAGE[30:])

    with site() as there:
        url = there.odd("/rain", slow)
        house = house_factory(home)
        house.start("registry")
        house.start("datasets", "--max-workers", "1", "--web-hosts", there.host())
        fetched = ("dataset", "import", url, "--name", "fetched", "--validation", "0")
        try:
            said, first = left(cli, *fetched, at="datasets/fetched: fetch")
            assert "left; the daemon goes on making datasets/fetched, and nothing stops that but its own end" in said
            assert f"to come back to it: the same command with --request-id {first}" in said
            assert "qlorad dataset show fetched tells whether it is done, qlorad dataset delete fetched" in said
            said, second = left(cli, *docs, at="datasets/notes: queued")
            assert "the daemon goes on making datasets/notes" in said and first != second
        finally:
            go.set()
        came = cli.json(*fetched, "--request-id", first)
        assert came["stats"]["rows"] == {"train": 1}
        eventually(lambda: "datasets/notes" in cli.inside("dataset", "list", "-o", "json"), what="what goes on alone")
        assert "'datasets/notes' exists already" in cli.json(*docs, code=1)["error"]["message"]
        told = cli.json(*docs, "--request-id", second)
        assert told["dataset"]["stats"]["rows"] == {"train": 1} and told["ledger"]["digest"]
        wrong = cli.json(*docs, "--request-id", first, code=1)
        assert wrong["error"]["reason"] == "REQUEST_ID_REUSED"


def test_what_is_said_is_what_is_known() -> None:
    making = Making("rain", "abc", False)
    assert "left before datasets/rain was begun" in making.story() and "--request-id" not in making.story()
    heard = making.asking(lambda _: None)
    assert "may have begun" in making.story() and "--request-id abc" in making.story()
    from qlorad._wire_core import stage

    heard(stage("parse", 1, 2))
    assert "the daemon goes on making datasets/rain" in making.story() and "delete rain" in making.story()
    moved = Making("rain", "abc", True)
    moved.asking(lambda _: None)
    assert "delete" not in moved.story()  # that would take the name from what had it before, too
