"""Starts a hub for tests and orders faults of it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.house import ROOT
from tests.hub.repos import SETTINGS


@dataclass(frozen=True, slots=True)
class Server:
    """A hub that runs."""

    url: str
    root: pathlib.Path

    def put(
        self, name: str, files: Mapping[str, bytes], kind: str = "datasets", revision: str = "", **settings: Any
    ) -> pathlib.Path:
        """Puts a repository there, or files into one. Settings: token, private, gated, lfs (patterns)."""
        folder = self.root / kind / (f"{name}@{revision.replace('/', '%2F')}" if revision else name)
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        if settings:
            (folder / SETTINGS).write_text(json.dumps(settings))
        return folder

    def order(self, kind: str, match: str, **told: Any) -> None:
        """The next answers to requests that match "METHOD /path" go wrong: see faults.Fault."""
        self._control({"kind": kind, "match": match, **told})

    def clear(self) -> None:
        """Forgets orders and log."""
        self._control({})

    def log(self, match: str = "") -> list[dict[str, Any]]:
        """What was asked so far."""
        return [e for e in self._control(None)["log"] if match in f"{e['method']} {e['path']}"]

    def left(self) -> list[dict[str, Any]]:
        """Faults that did not strike yet."""
        faults: list[dict[str, Any]] = self._control(None)["faults"]
        return faults

    def _control(self, told: Any) -> dict[str, Any]:
        data = None if told is None else json.dumps(told).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.url}/_control", data), timeout=20) as answer:
            read: dict[str, Any] = json.load(answer)
        log = read["log"]
        read["log"] = [e for e in log if not e["path"].startswith("/_control")]
        return read


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[Server]:
    """A hub over the repositories below a folder, ended whatever happens."""
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.hub", str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, f"the hub ended with {process.wait(10)}"
            yield Server(f"http://127.0.0.1:{port}", root)
        finally:
            process.kill()
