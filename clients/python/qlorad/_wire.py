"""The plain transport: opens a channel when first used, translates failures, tries again.

Law of this room: the twin of `aio/_wire.py`, line by line; thin, and nothing
decided here.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from qlorad import _connection, errors
from qlorad._connection import Connection, Target
from qlorad._wire_core import CHUNK_BYTES, Patience, Progress, worth_repeating

Req = TypeVar("Req")
Res = TypeVar("Res")
T = TypeVar("T")

sleep = time.sleep


def read_file(path: pathlib.Path, offset: int) -> Iterator[bytes]:
    """A file's bytes from an offset, in pieces."""
    with path.open("rb") as f:
        f.seek(offset)
        while data := f.read(CHUNK_BYTES):
            yield data


def in_thread(work: Callable[[], T]) -> T:
    """Blocking work; plain code may block."""
    return work()


class Wire:
    """The way to one daemon."""

    def __init__(self, connection: Connection, service: str) -> None:
        self._connection = connection
        self._service = service
        self._target: Target | None = None
        self._channel: grpc.Channel | None = None

    @property
    def target(self) -> Target:
        """Where the daemon is thought to be."""
        if self._target is None:
            self._target = self._connection.target(self._service)
        return self._target

    @property
    def channel(self) -> grpc.Channel:
        """The channel; opened when first asked for."""
        if self._channel is None:
            options = _connection.channel_options(self._service)
            if self.target.tls:
                self._channel = grpc.secure_channel(self.target.address, self._connection.credentials(), options)
            else:
                self._channel = grpc.insecure_channel(self.target.address, options)
        return self._channel

    def look_again(self) -> None:
        """Finds a daemon that came back at another address."""
        found = self._connection.target(self._service)
        if found != self._target:
            self.close()
            self._target = found

    def close(self) -> None:
        """Closes the channel; a later call opens it again."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def call(self, method: grpc.UnaryUnaryMultiCallable[Req, Res], request: Req) -> Res:
        """One answer to one request."""
        try:
            return method(request, metadata=self._connection.metadata(self.target))
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None

    def send(self, method: grpc.StreamUnaryMultiCallable[Req, Res], requests: Iterator[Req]) -> Res:
        """One answer to a stream of requests."""
        try:
            return method(requests, metadata=self._connection.metadata(self.target))
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None

    def stream(self, method: grpc.UnaryStreamMultiCallable[Req, Res], request: Req) -> Iterator[Res]:
        """The messages of an answer; the call is given up when the reader stops."""
        call = method(request, metadata=self._connection.metadata(self.target))
        try:
            for message in call:  # noqa: UP028 - the call is closed by us alone
                yield message
        except grpc.RpcError as e:
            raise _connection.failure(e, self.target) from None
        finally:
            call.cancel()

    def work(
        self,
        method: Callable[[], grpc.UnaryStreamMultiCallable[Req, Res]],
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
                for message in self.stream(method(), request):
                    update: Any = message
                    if update.WhichOneof("update") != "progress":
                        return message
                    patience.renew()
                    progress(update.progress)
                raise errors.Unavailable(f"{self.target} ended the stream without a result")
            except errors.QloradError as e:
                if not worth_repeating(e):
                    raise
                sleep(patience.wait(e))
                self.look_again()
