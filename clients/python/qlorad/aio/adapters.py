"""Adapters on the shelf: import, download, list, alias, delete."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, BinaryIO

from qlorad import errors
from qlorad._connection import new_request_id
from qlorad._wire_core import full_name, optional_name
from qlorad.aio._wire import Wire, in_thread, read_file
from qlorad.v1 import artifacts_pb2
from qlorad.v1 import registry_pb2 as pb
from qlorad.v1.registry_pb2_grpc import AdapterServiceStub

if TYPE_CHECKING:
    from qlorad.v1.registry_pb2_grpc import AdapterServiceAsyncStub

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Adapters:
    """AdapterService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> AdapterServiceAsyncStub:
        return AdapterServiceStub(self._wire.channel)

    async def import_folder(
        self,
        folder: str | os.PathLike[str],
        name: str,
        base_model: str,
        *,
        move_alias: bool = False,
        request_id: str = "",
    ) -> pb.Adapter:
        """Sends a PEFT folder and seals it for a base. Only the two files of an adapter are sent."""
        header = pb.ImportAdapterHeader(
            request_id=request_id or new_request_id(),
            adapter_id=name.removeprefix("adapters/"),
            base_model=full_name("models", base_model),
            move_alias=move_alias,
        )
        source = pathlib.Path(folder)
        for file in FILES:
            if not (source / file).is_file():
                raise errors.invalid("folder", str(folder), f"a folder that holds {' and '.join(FILES)}")
        return (await self._wire.send(self._stub.ImportAdapter, _pieces(header, source))).adapter

    async def download(self, adapter: str, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the adapter's files into a folder that plain peft loads; each file is checked against its sha256.

        A file appears under its name only when it is whole and right.
        """
        target = pathlib.Path(folder)
        await in_thread(lambda: target.mkdir(parents=True, exist_ok=True))
        request = pb.DownloadAdapterRequest(name=full_name("adapters", adapter))
        writing: _Incoming | None = None
        async for message in self._wire.stream(self._stub.DownloadAdapter, request):
            if message.WhichOneof("piece") == "file":
                if writing is not None:
                    await in_thread(writing.finish)
                writing = _Incoming(target, message.file)
            elif writing is not None:
                writing.write(message.data)
        if writing is not None:
            await in_thread(writing.finish)
        return target

    async def get(self, adapter: str) -> pb.Adapter:
        """One adapter by alias or digest."""
        request = pb.GetAdapterRequest(name=full_name("adapters", adapter))
        return (await self._wire.call(self._stub.GetAdapter, request)).adapter

    async def list(self, *, base_model: str = "") -> AsyncIterator[pb.Adapter]:
        """All adapters (of a model, where one is named), newest first, page by page."""
        token = ""
        while True:
            request = pb.AdapterServiceListAdaptersRequest(
                page_token=token, base_model=optional_name("models", base_model)
            )
            page = await self._wire.call(self._stub.ListAdapters, request)
            for adapter in page.adapters:
                yield adapter
            token = page.next_page_token
            if not token:
                return

    async def set_alias(
        self, alias: str, adapter: str, *, expected_generation: int | None = None, request_id: str = ""
    ) -> artifacts_pb2.Alias:
        """Points an alias at an adapter; with `expected_generation` only if nobody moved it (0 = it is new)."""
        request = pb.SetAdapterAliasRequest(
            request_id=request_id or new_request_id(),
            alias=full_name("adapters", alias),
            adapter=full_name("adapters", adapter),
            expected_generation=expected_generation,
        )
        return (await self._wire.call(self._stub.SetAdapterAlias, request)).alias

    async def delete(self, adapter: str, *, request_id: str = "") -> int:
        """Removes an alias, and the files once nothing holds them; returns the bytes freed."""
        request = pb.DeleteAdapterRequest(
            request_id=request_id or new_request_id(), name=full_name("adapters", adapter)
        )
        return (await self._wire.call(self._stub.DeleteAdapter, request)).freed_bytes


class _Incoming:
    """A file on its way in, under another name until it is whole."""

    def __init__(self, folder: pathlib.Path, entry: artifacts_pb2.FileEntry) -> None:
        if entry.path != pathlib.PurePath(entry.path).name or entry.path in ("", ".", ".."):
            raise errors.DataLoss(f"the daemon sent a file named {entry.path!r}, which is no plain name")
        self._entry = entry
        self._final = folder / entry.path
        self._part = folder / (entry.path + ".part")
        self._file: BinaryIO = self._part.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> None:
        self._file.close()
        if self._digest.hexdigest() != self._entry.sha256:
            self._part.unlink()
            raise errors.DataLoss(f"{self._entry.path} came in damaged: its sha256 is not {self._entry.sha256}")
        os.replace(self._part, self._final)


async def _pieces(header: pb.ImportAdapterHeader, folder: pathlib.Path) -> AsyncIterator[pb.ImportAdapterRequest]:
    yield pb.ImportAdapterRequest(header=header)
    for file in FILES:
        yield pb.ImportAdapterRequest(path=file)
        async for data in read_file(folder / file, 0):
            yield pb.ImportAdapterRequest(data=data)
