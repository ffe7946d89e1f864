"""What a dataset is made of, brought here: from a hub, or found in a folder of this host.

Law of this room: bytes of a hub and the paths of a folder are looked at by a
worker only. What a hub gave is kept by endpoint, repository and revision, so
that a cut or a kill costs nothing that was there; nobody touches it for a
week, and it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import pathlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault, not_found
from services.common.frames.v1 import ingest_pb2
from services.datasets.workers import Workers, fault_of

KEEP_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Origins:
    """From where rows may be fetched."""

    endpoint: str
    token_file: str
    """Empty = no token."""
    import_roots: tuple[pathlib.Path, ...]
    max_bytes: int


@dataclass(slots=True)
class _Turn:
    """Calls for one repository, one after the other."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Fetches:
    """Brings the files of hub and folder sources."""

    def __init__(self, workers: Workers, folder: pathlib.Path, origins: Origins) -> None:
        self._workers = workers
        self._folder = folder
        self._origins = origins
        self._turns: dict[str, _Turn] = {}

    async def sweep(self) -> None:
        """Throws away what nobody fetched for a week."""

        def clear() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for kept in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another sweep was here
                    if time.time() - kept.stat().st_mtime > KEEP_SECONDS:
                        shutil.rmtree(kept, ignore_errors=True)

        await asyncio.to_thread(clear)

    async def fetch(
        self, request: datasets_pb2.CreateDatasetRequest, tell: Callable[[str, int, int], None]
    ) -> ingest_pb2.FetchDone:
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
        path = pathlib.Path(source.path)
        try:
            resolved = path.resolve(strict=True)
            if not any(resolved.is_relative_to(root.resolve()) for root in self._origins.import_roots):
                raise self._denied(path, "lies outside of import_roots")
            if not resolved.is_dir():
                raise not_found(str(path))
        except (FileNotFoundError, NotADirectoryError):
            raise not_found(str(path)) from None
        except (PermissionError, RuntimeError) as e:
            raise self._denied(path, str(e)) from None
        order = ingest_pb2.FetchOrder(folder=source, max_bytes=self._origins.max_bytes)
        order.folder.path = str(resolved)
        return order

    def _denied(self, path: pathlib.Path, why: str) -> Fault:
        below = ", ".join(map(str, self._origins.import_roots))
        told = f"folder.path: {path} {why}; accepted: readable folders below {below} (--import-roots)"
        return Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=str(path))

    async def _run(self, order: ingest_pb2.FetchOrder, tell: Callable[[str, int, int], None]) -> ingest_pb2.FetchDone:
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
