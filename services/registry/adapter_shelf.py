"""Adapters: taken in, told of, sent out, named, removed.

Law of this room: what a stranger sends is written aside, looked at by a worker,
and only then sealed. Decides nothing; see adapters.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, errors_pb2, registry_pb2
from services.common import artifacts, names
from services.common.errors import Fault, already_exists, invalid, invalid_field
from services.common.frames.v1 import shelf_pb2
from services.common.idempotency import body_of
from services.common.shelf import Sealed, Shelf, Staged
from services.registry import adapters, paging
from services.registry.adapters import Intake
from services.registry.removal import remove
from services.registry.requests import Requests
from services.registry.staging import Staging
from services.registry.workers import Workers

log = logging.getLogger("qlorad.registry.adapters")

KIND = artifacts_pb2.ARTIFACT_KIND_ADAPTER
SEND_BYTES = 1 << 20


class AdapterShelf:
    """The adapters of one store."""

    def __init__(self, shelf: Shelf, staging: Staging, requests: Requests, workers: Workers, limit_bytes: int) -> None:
        self._shelf = shelf
        self._staging = staging
        self._requests = requests
        self._workers = workers
        self._limit_bytes = limit_bytes
        self._few_at_once = asyncio.Semaphore(2)
        self._one_change = asyncio.Lock()

    # in

    async def take(
        self, header: registry_pb2.ImportAdapterHeader, pieces: AsyncIterator[registry_pb2.ImportAdapterRequest]
    ) -> registry_pb2.Adapter:
        """Receives, checks and seals an adapter for its base, and names it."""
        adapters.check_header(header)
        ident = header.base_model.removeprefix("models/")
        base = await asyncio.to_thread(self._shelf.open, "models", ident, field="base_model")
        async with self._staging.aside() as staged:
            body = await self._receive(header, pieces, staged.payload)

            async def work(again: bool) -> registry_pb2.Adapter:
                sealed = await self._check_and_seal(header, base, staged)
                log.info("adapters/%s is %s", header.adapter_id, sealed.digest)
                return await asyncio.to_thread(self._describe, sealed, header.adapter_id)

            return await self._requests.once("ImportAdapter", header.request_id, body, work, registry_pb2.Adapter)

    async def _receive(
        self,
        header: registry_pb2.ImportAdapterHeader,
        pieces: AsyncIterator[registry_pb2.ImportAdapterRequest],
        payload: pathlib.Path,
    ) -> bytes:
        """Writes the files aside; the fingerprint of header and files."""
        intake = Intake(f"adapters/{header.adapter_id}", self._limit_bytes)
        async for piece in pieces:
            match piece.WhichOneof("piece"):
                case "path":
                    await asyncio.to_thread((payload / intake.begin(piece.path)).touch)
                case "data":
                    intake.grow(len(piece.data))
                    await asyncio.to_thread(_append, payload / intake.current, piece.data)
                case other:
                    raise invalid_field("piece", other, "a header once, first; then paths and data")
        intake.end()
        files = await asyncio.to_thread(artifacts.list_payload, payload)
        return hashlib.sha256(body_of(header) + b"".join(body_of(f) for f in files)).digest()

    async def _check_and_seal(self, header: registry_pb2.ImportAdapterHeader, base: Sealed, staged: Staged) -> Sealed:
        name = f"adapters/{header.adapter_id}"
        order = shelf_pb2.AdapterWork(
            folder=str(staged.payload), base_payload=str(base.payload), base_facts=base.manifest.facts, name=name
        )
        async with self._few_at_once:
            done = await self._workers.run(shelf_pb2.ShelfOrder(adapter=order), name, lambda _: None)
        told = artifacts.facts_of(base.manifest)
        lineage = artifacts_pb2.Lineage(
            base_digest=base.digest,
            tokenizer_digest=told["tokenizer_digest"],
            template_digest=told["template_digest"],
        )
        facts = json_format.MessageToDict(done.facts)
        async with self._one_change:
            return await asyncio.to_thread(self._seal_and_name, header, staged, facts, lineage)

    def _seal_and_name(
        self,
        header: registry_pb2.ImportAdapterHeader,
        staged: Staged,
        facts: dict[str, object],
        lineage: artifacts_pb2.Lineage,
    ) -> Sealed:
        alias = self._shelf.alias("adapters", header.adapter_id)
        digest = artifacts.digest_of(KIND, artifacts.list_payload(staged.payload), lineage)
        if alias is not None and alias.digest != digest and not header.move_alias:
            raise already_exists(alias.name, "accepted: another adapter_id, or move_alias")
        story = {"source": "import", "base_model": header.base_model}
        sealed = self._shelf.seal(staged, KIND, facts, lineage, (adapters.IMPORT_MAKER, story))
        generation = alias.generation if alias else 0
        self._shelf.set_alias("adapters", header.adapter_id, digest, None if header.move_alias else generation)
        return sealed

    # out

    async def send(self, name: str) -> AsyncGenerator[registry_pb2.DownloadAdapterResponse]:
        """Every file of an adapter, whose every byte was compared first. Nobody removes it meanwhile."""
        ident = names.parse("name", name, "adapters")
        digest = await asyncio.to_thread(self._shelf.resolve, "adapters", ident)
        pin = await asyncio.to_thread(self._shelf.pin, digest, "download")
        try:
            sealed = await asyncio.to_thread(self._shelf.open, "adapters", digest, verify=True)
            for file in sealed.manifest.files:
                yield registry_pb2.DownloadAdapterResponse(file=file)
                for offset in range(0, file.size_bytes, SEND_BYTES):
                    data = await asyncio.to_thread(_read, sealed.payload / file.path, offset)
                    yield registry_pb2.DownloadAdapterResponse(data=data)
        finally:
            pin.release()

    def _describe(self, sealed: Sealed, asked: str = "") -> registry_pb2.Adapter:
        aliases = self._shelf.aliases("adapters")
        return adapters.describe(sealed.manifest, aliases, self._shelf.provenance(sealed), asked)

    async def get(self, name: str) -> registry_pb2.Adapter:
        """One adapter by alias or digest."""
        ident = names.parse("name", name, "adapters")
        return await asyncio.to_thread(lambda: self._describe(self._shelf.open("adapters", ident), ident))

    async def page(self, size: int, token: str, base_model: str) -> tuple[list[registry_pb2.Adapter], str]:
        """A page of adapters, newest first; only those of a base if one is named."""
        names.page_size(size)
        return await asyncio.to_thread(self._list, size, token, base_model)

    def _list(self, size: int, token: str, base_model: str) -> tuple[list[registry_pb2.Adapter], str]:
        base = self._base_digest(base_model) if base_model else ""
        found = [s for s in self._shelf.every(KIND) if not base or s.manifest.lineage.base_digest == base]
        told, following = paging.page(found, lambda s: (s.manifest.create_time.ToNanoseconds(), s.digest), size, token)
        return [self._describe(s) for s in told], following

    def _base_digest(self, base_model: str) -> str:
        ident = names.parse("base_model", base_model, "models")
        if names.is_digest(ident):
            return ident  # its adapters may outlive it
        try:
            return self._shelf.resolve("models", ident, "base_model")
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND:
                raise
            raise invalid_field("base_model", base_model, f"a model on the shelf ({fault.message})") from None

    # name, remove

    async def set_alias(self, request: registry_pb2.SetAdapterAliasRequest) -> artifacts_pb2.Alias:
        """Makes or moves an alias by compare-and-swap."""
        alias, target, expected = adapters.check_set_alias(request)

        async def work(again: bool) -> artifacts_pb2.Alias:
            return await asyncio.to_thread(self._move, alias, target, expected, again)

        async with self._one_change:
            return await self._requests.once(
                "SetAdapterAlias", request.request_id, body_of(request), work, artifacts_pb2.Alias
            )

    def _move(self, alias: str, target: str, expected: int | None, again: bool) -> artifacts_pb2.Alias:
        sealed = self._shelf.open("adapters", target, field="adapter")
        now = self._shelf.alias("adapters", alias)
        if again and now is not None and expected is not None:
            if now.digest == sealed.digest and now.generation == expected + 1:
                return now  # this very request moved it before the daemon was cut off
        return self._shelf.set_alias("adapters", alias, sealed.digest, expected)

    async def delete(self, request: registry_pb2.DeleteAdapterRequest) -> registry_pb2.DeleteAdapterResponse:
        """Removes an alias, and the files with the last one; tells the bytes freed."""
        wrong = names.check_request_id(request.request_id) + names.check_name("name", request.name, "adapters")
        if wrong:
            raise invalid(wrong)
        ident = request.name.removeprefix("adapters/")

        async def work(again: bool) -> registry_pb2.DeleteAdapterResponse:
            freed = await asyncio.to_thread(remove, self._shelf, "adapters", ident, again)
            return registry_pb2.DeleteAdapterResponse(freed_bytes=freed)

        async with self._one_change:
            return await self._requests.once(
                "DeleteAdapter", request.request_id, body_of(request), work, registry_pb2.DeleteAdapterResponse
            )


def _append(path: pathlib.Path, data: bytes) -> None:
    with path.open("ab") as f:
        f.write(data)


def _read(path: pathlib.Path, offset: int) -> bytes:
    with path.open("rb") as f:
        f.seek(offset)
        return f.read(SEND_BYTES)
