"""Where a dataset's rows come from: uploads, a hub, a folder, the web, a collection, or other datasets.

Law of this room: what a run reads is there, whole and held until the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import metadata

from qlorad.v1 import datasets_pb2
from services.common.errors import wrong_state
from services.common.frames.v1 import ingest_pb2
from services.common.shards import splits_in
from services.common.shelf import Shelf
from services.datasets.catalog import Catalog
from services.datasets.checks import upload_id
from services.datasets.fetches import Fetches, source_of
from services.datasets.runs import Tell
from services.datasets.uploads import Uploads


@dataclass(slots=True)
class Given:
    """What a run reads."""

    sources: list[ingest_pb2.IngestSource] = field(default_factory=list)
    parents: list[datasets_pb2.DatasetParent] = field(default_factory=list)
    source: str = ""
    left_out: list[str] = field(default_factory=list)
    """Data files that lie there too and are not read."""

    def complete(self, lineage: datasets_pb2.DatasetLineage) -> None:
        """Adds what the worker could not know."""
        lineage.parents.extend(self.parents)
        lineage.source = self.source
        lineage.made_by = f"qlorad-services {metadata.version('qlorad-services')}"


class Inputs:
    """Finds what a request names."""

    def __init__(self, uploads: Uploads, catalog: Catalog, shelf: Shelf, fetches: Fetches) -> None:
        self._uploads = uploads
        self._catalog = catalog
        self._shelf = shelf
        self._fetches = fetches

    @contextlib.asynccontextmanager
    async def gathered(self, request: datasets_pb2.CreateDatasetRequest, tell: Tell) -> AsyncIterator[Given]:
        """Everything that the request names, fetched and held; NOT_FOUND, WRONG_STATE and what fetching may meet."""
        given, pins = Given(), []
        held = contextlib.AsyncExitStack()
        try:
            for i, name in enumerate(request.uploads):
                given.sources.append(await self._upload(f"uploads[{i}]", name))
            if source_of(request):
                fetched = await held.enter_async_context(self._fetches.fetched(request, tell))
                given.sources.extend(fetched.sources)
                given.source = fetched.source
                given.left_out.extend(fetched.left_out)
            for i, name in enumerate(request.parents):
                sealed = await asyncio.to_thread(self._catalog.open, name, f"parents[{i}]", True)
                pins.append(await asyncio.to_thread(self._shelf.pin, sealed.digest, "ingest"))
                given.parents.append(datasets_pb2.DatasetParent(name=name, digest=sealed.digest))
                for split in splits_in(sealed.payload):
                    told = f"{name} ({split})"
                    given.sources.append(
                        ingest_pb2.IngestSource(path=str(sealed.payload), filename=told, split=split, sealed=True)
                    )
            yield given
        finally:
            for pin in pins:
                pin.release()
            await held.aclose()

    async def _upload(self, field: str, name: str) -> ingest_pb2.IngestSource:
        upload = await self._uploads.get(upload_id(field, name))
        if not upload.complete:
            told = f"incomplete ({upload.committed_bytes} of {upload.size_bytes} bytes)"
            raise wrong_state(name, told, ["complete"])
        path = self._uploads.path(name.removeprefix("uploads/"))
        return ingest_pb2.IngestSource(path=str(path), filename=upload.filename, sha256=upload.sha256)
