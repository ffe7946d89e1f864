"""The asyncio transport: opens a channel when first used, translates failures, tries again.

Law of this room: thin. What to wait and what is new is decided in `_wire_core`;
its twin for plain code is `qlorad/_wire.py`, written by hand. Everything built on
top of it is written once, here under `aio`, and made into plain code by
clients/python/unasync.py.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from qlorad import _connection, errors
from qlorad._connection import Connection, Target
from qlorad._wire_core import CHUNK_BYTES, Patience, Progress, worth_repeating

Req = TypeVar("Req")
Res = TypeVar("Res")
T = TypeVar("T")

sleep = asyncio.sleep


async def read_file(path: pathlib.Path, offset: int) -> AsyncIterator[bytes]:
    """A file's bytes from an offset, in pieces, off the event loop."""
    with await asyncio.to_thread(path.open, "rb") as f:
        f.seek(offset)
        while data := await asyncio.to_thread(f.read, CHUNK_BYTES):
            yield data


async def in_thread(work: Callable[[], T]) -> T:
    """Blocking work, off the event loop."""
    return await asyncio.to_thread(work)


class Wire:
    """The way to one daemon."""

    def __init__(self, connection: Connection, service: str) -> None:
        self._connection = connection
        self._service = service
        self._target: Target | None = None
        self._channel: grpc.aio.Channel | None = None

    @property
    def target(self) -> Target:
        """Where the daemon is thought to be."""
        if self._target is None:
            self._target = self._connection.target(self._service)
        return self._target

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel; opened when first asked for."""
        if self._channel is None:
            options = _connection.channel_options(self._service)
            if self.target.tls:
                self._channel = grpc.aio.secure_channel(self.target.address, self._connection.credentials(), options)
            else:
                self._channel = grpc.aio.insecure_channel(self.target.address, options)
        return self._channel

    async def look_again(self) -> None:
        """Finds a daemon that came back at another address."""
        found = self._connection.target(self._service)
        if found != self._target:
            await self.close()
            self._target = found

    async def close(self) -> None:
        """Closes the channel; a later call opens it again."""
        if self._channel is not None:
            await self._channel.close()
        self._channel = None

    async def call(self, method: grpc.aio.UnaryUnaryMultiCallable[Req, Res], request: Req) -> Res:
        """One answer to one request."""
        try:
            return await method(request, metadata=self._connection.metadata(self.target))
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None

    async def send(self, method: grpc.aio.StreamUnaryMultiCallable[Req, Res], requests: AsyncIterator[Req]) -> Res:
        """One answer to a stream of requests."""
        try:
            return await method(requests, metadata=self._connection.metadata(self.target))
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None

    async def stream(self, method: grpc.aio.UnaryStreamMultiCallable[Req, Res], request: Req) -> AsyncIterator[Res]:
        """The messages of an answer; the call is given up when the reader stops."""
        call = method(request, metadata=self._connection.metadata(self.target))
        try:
            async for message in call:
                yield message
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None
        finally:
            call.cancel()

    async def work(
        self,
        method: Callable[[], grpc.aio.UnaryStreamMultiCallable[Req, Res]],
        request: Req,
        progress: Progress,
        seconds: float,
    ) -> Res:
        """The last message of a stream of progress; a cut stream is called again with the same request.

        The method is asked for anew each time: its channel may have changed.
        """
        patience = Patience(seconds)
        while True:
            try:
                async for message in self.stream(method(), request):
                    update: Any = message
                    if update.WhichOneof("update") != "progress":
                        return message
                    patience.renew()
                    progress(update.progress)
                raise errors.Unavailable(f"{self.target} ended the stream without a result")
            except errors.QloradError as e:
                if not worth_repeating(e):
                    raise
                await sleep(patience.wait(e))
                await self.look_again()
