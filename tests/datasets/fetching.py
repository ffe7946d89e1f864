"""What tests of fetching share: the real worker behind Fetches, in a home of its own."""

from __future__ import annotations

import contextlib
import pathlib
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry

from qlorad.v1 import datasets_pb2
from services.common.errors import Fault
from services.common.frames.v1 import ingest_pb2
from services.datasets.fetches import Fetches, Origins
from services.datasets.metrics import Metrics
from services.datasets.worker import hub as worker_hub
from services.datasets.workers import Workers


@dataclass(slots=True)
class Bench:
    """Fetches over a home."""

    home: pathlib.Path
    endpoint: str = ""
    token: str = ""
    roots: tuple[pathlib.Path, ...] = (pathlib.Path("/"),)
    max_bytes: int = 1 << 30
    told: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def state(self) -> pathlib.Path:
        return self.home / "state" / "hub"

    def fetches(self) -> Fetches:
        workers = Workers(self.home / "logs", 1 << 30, 60, Metrics(CollectorRegistry()))
        token_file = self.home / "token"
        if self.token:
            token_file.parent.mkdir(parents=True, exist_ok=True)
            token_file.write_text(f"{self.token}\n")
        origins = Origins(self.endpoint, str(token_file) if self.token else "", self.roots, self.max_bytes)
        return Fetches(workers, self.state, origins)

    async def hub(self, repo: str, **fields: Any) -> ingest_pb2.FetchDone:
        """Fetches a dataset of the hub."""
        request = datasets_pb2.CreateDatasetRequest(hub=datasets_pb2.HubSource(repo=repo, **fields))
        return await self.fetches().fetch(request, lambda *told: self.told.append(told))

    async def folder(self, path: pathlib.Path, **fields: Any) -> ingest_pb2.FetchDone:
        """Finds a dataset in a folder."""
        request = datasets_pb2.CreateDatasetRequest(folder=datasets_pb2.FolderSource(path=str(path), **fields))
        return await self.fetches().fetch(request, lambda *told: self.told.append(told))

    def here(self, repo: str, **fields: Any) -> ingest_pb2.FetchDone:
        """As `hub`, by the worker's own code in this process: for many cases in little time."""
        order = ingest_pb2.FetchOrder(
            into=str(self.state), endpoint=self.endpoint, token=self.token, max_bytes=self.max_bytes
        )
        order.hub.CopyFrom(datasets_pb2.HubSource(repo=repo, **fields))
        self.state.mkdir(parents=True, exist_ok=True)
        return worker_hub.fetch(order, lambda *_: None)

    def refused_here(self, repo: str, **fields: Any) -> Fault:
        """How a fetch in this process fails."""
        with pytest.raises(Fault) as caught:
            self.here(repo, **fields)
        return caught.value

    async def refused(self, repo: str, **fields: Any) -> Fault:
        """How a fetch from the hub fails."""
        with pytest.raises(Fault) as caught:
            await self.hub(repo, **fields)
        return caught.value


def workers_running() -> list[psutil.Process]:
    """Fetch workers of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "services.datasets.worker.fetch" in child.cmdline():
                found.append(child)
    return found


def contents(done: ingest_pb2.FetchDone) -> dict[str, bytes]:
    """What was fetched, by name."""
    return {s.filename: pathlib.Path(s.path).read_bytes() for s in done.sources}
