"""What a dataset is made of, brought here: from a hub or the web, or found in a folder of this host.

Law of this room: bytes of a server and the paths of a folder are looked at by a
worker only. What a hub gave is kept by endpoint, repository and revision, so
that a cut or a kill costs nothing that was there; nobody touches it for a
week, and it goes. What came from elsewhere goes with the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault, not_found
from services.common.frames.v1 import ingest_pb2
from services.datasets import web_rules
from services.datasets.workers import Workers, fault_of

KEEP_SECONDS = 7 * 86400.0
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Origins:
    """From where rows may be fetched."""

    endpoint: str
    token_file: str
    """Empty = no token."""
    import_roots: tuple[pathlib.Path, ...]
    max_bytes: int
    web_hosts: tuple[str, ...] = ()
    """Entries of the allow-list, as web_rules reads them; none = no page is fetched."""
    page_bytes: int = 64 << 20
    page_seconds: float = 120.0


def source_of(request: datasets_pb2.CreateDatasetRequest) -> str:
    """The field of a request whose files are fetched; empty for uploads and parents."""
    given = (
        ("hub", request.HasField("hub")),
        ("folder", request.HasField("folder")),
        ("web", request.HasField("web")),
        ("chroma", request.HasField("chroma")),
    )
    return next((name for name, is_there in given if is_there), "")


@dataclass(slots=True)
class _Turn:
    """Calls for one repository, one after the other."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Fetches:
    """Brings the files of every source that is not an upload or a dataset."""

    def __init__(self, workers: Workers, folder: pathlib.Path, origins: Origins) -> None:
        self._workers = workers
        self._folder = folder
        self._passing = folder.with_name("fetched")
        self._origins = origins
        self._turns: dict[str, _Turn] = {}

    async def start(self) -> None:
        """Throws away what runs of a killed daemon had fetched, and what nobody wanted for a week."""
        await asyncio.to_thread(shutil.rmtree, self._passing, True)
        await self.sweep()

    async def sweep(self) -> None:
        """Throws away what nobody fetched for a week."""

        def clear() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for kept in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another sweep was here
                    if time.time() - kept.stat().st_mtime > KEEP_SECONDS:
                        shutil.rmtree(kept, ignore_errors=True)

        await asyncio.to_thread(clear)

    @contextlib.asynccontextmanager
    async def fetched(
        self, request: datasets_pb2.CreateDatasetRequest, tell: Tell
    ) -> AsyncIterator[ingest_pb2.FetchDone]:
        """The files of a well-formed request's source, in order, each with its digest; there as long as this lasts."""
        kind = source_of(request)
        outcome = "lost"
        try:
            async with contextlib.AsyncExitStack() as held:
                if kind in ("web", "chroma"):
                    into = await asyncio.to_thread(self._room)
                    held.push_async_callback(asyncio.to_thread, shutil.rmtree, into, True)
                    make = self._web_order if kind == "web" else self._chroma_order
                    done = await self._run(await asyncio.to_thread(make, request, into), tell)
                else:
                    done = await self.fetch(request, tell)
                outcome = "done"
                yield done
        except Fault as e:
            if outcome != "done":
                outcome = errors_pb2.Reason.Name(e.reason).removeprefix("REASON_").lower()
            raise
        finally:
            self._workers.metrics.fetches.labels(kind, outcome).inc()

    def _room(self) -> pathlib.Path:
        self._passing.mkdir(parents=True, exist_ok=True, mode=0o700)
        return pathlib.Path(tempfile.mkdtemp(dir=self._passing))

    async def fetch(self, request: datasets_pb2.CreateDatasetRequest, tell: Tell) -> ingest_pb2.FetchDone:
        """The files of a well-formed request's hub or folder source, in order, each with its digest."""
        if request.HasField("folder"):
            return await self._run(await asyncio.to_thread(self._folder_order, request.folder), tell)
        hub = request.hub
        what = f"{self._origins.endpoint}\n{hub.repo}\n{hub.revision or 'main'}"
        key = hashlib.sha256(what.encode()).hexdigest()[:32]
        turn = self._turns.setdefault(key, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                order = await asyncio.to_thread(self._hub_order, hub, self._folder / key)
                await self.sweep()
                return await self._run(order, tell)
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._turns[key]

    def _hub_order(self, hub: datasets_pb2.HubSource, into: pathlib.Path) -> ingest_pb2.FetchOrder:
        into.mkdir(parents=True, exist_ok=True, mode=0o700)
        into.touch()  # its week begins anew
        token = ""
        if self._origins.token_file:
            try:
                token = pathlib.Path(self._origins.token_file).read_text().strip()
            except OSError as e:
                told = f"--hub-token-file cannot be read: {e.strerror}; accepted: a readable file with a token"
                raise Fault(errors_pb2.REASON_PERMISSION_DENIED, told) from None
        return ingest_pb2.FetchOrder(
            into=str(into), hub=hub, endpoint=self._origins.endpoint, token=token, max_bytes=self._origins.max_bytes
        )

    def _folder_order(self, source: datasets_pb2.FolderSource) -> ingest_pb2.FetchOrder:
        order = ingest_pb2.FetchOrder(folder=source, max_bytes=self._origins.max_bytes)
        order.folder.path = str(self._below_roots("folder.path", source.path))
        return order

    def _chroma_order(self, request: datasets_pb2.CreateDatasetRequest, into: pathlib.Path) -> ingest_pb2.FetchOrder:
        order = ingest_pb2.FetchOrder(into=str(into), chroma=request.chroma, max_bytes=self._origins.max_bytes)
        order.chroma.path = str(self._below_roots("chroma.path", request.chroma.path))
        return order

    def _web_order(self, request: datasets_pb2.CreateDatasetRequest, into: pathlib.Path) -> ingest_pb2.FetchOrder:
        origins = self._origins
        hosts = [web_rules.read_host(word) for word in origins.web_hosts]
        pages = [web_rules.read_url(url) for url in request.web.urls]
        closed = [page for page in pages if web_rules.allowance(page.place, hosts) is None]
        if closed:
            named = ", ".join(page.url_without_query for page in closed[:5])
            more = f" and {len(closed) - 5} more" if len(closed) > 5 else ""
            told = f"web.urls: {named}{more}: of no allowed host; accepted: {web_rules.told(origins.web_hosts)}"
            raise Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=closed[0].url_without_query)
        return ingest_pb2.FetchOrder(
            into=str(into),
            web=request.web,
            max_bytes=origins.max_bytes,
            web_hosts=origins.web_hosts,
            max_page_bytes=origins.page_bytes,
            page_seconds=origins.page_seconds,
        )

    def _below_roots(self, field: str, given: str) -> pathlib.Path:
        """Where a folder really lies; NOT_FOUND, or PERMISSION_DENIED outside of the roots."""
        path = pathlib.Path(given)
        try:
            resolved = path.resolve(strict=True)
            if not any(resolved.is_relative_to(root.resolve()) for root in self._origins.import_roots):
                raise self._denied(field, path, "lies outside of import_roots")
            if not resolved.is_dir():
                raise not_found(str(path))
        except (FileNotFoundError, NotADirectoryError):
            raise not_found(str(path)) from None
        except (PermissionError, RuntimeError) as e:
            raise self._denied(field, path, str(e)) from None
        return resolved

    def _denied(self, field: str, path: pathlib.Path, why: str) -> Fault:
        below = ", ".join(map(str, self._origins.import_roots))
        told = f"{field}: {path} {why}; accepted: readable folders below {below} (--import-roots)"
        return Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=str(path))

    async def _run(self, order: ingest_pb2.FetchOrder, tell: Tell) -> ingest_pb2.FetchDone:
        async with contextlib.aclosing(self._workers.reports("fetch", order)) as frames:
            async for frame in frames:
                report = ingest_pb2.FetchReport.FromString(frame)
                if report.WhichOneof("report") == "progress":
                    tell(report.progress.stage, report.progress.done, report.progress.total)
                elif report.WhichOneof("report") == "refusal":
                    raise fault_of(report.refusal)
                else:
                    return report.done
        raise AssertionError("reports end with a result or a fault")
