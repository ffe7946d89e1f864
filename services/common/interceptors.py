"""What every call of every daemon passes through: metrics, errors, auth, context.

Law of this room: one wrapper for the four kinds of call. Only here does an
exception become a status; an unknown one becomes INTERNAL with a log id and no
inside story.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from prometheus_client import CollectorRegistry, Counter, Histogram

from qlorad.v1 import errors_pb2
from services.common import caller, telemetry
from services.common.errors import Fault, Violation, disk_full, invalid, show, to_status

log = logging.getLogger("qlorad.rpc")

OPEN_PREFIXES = ("/grpc.health.v1.Health/",)
STANDING_PREFIXES = ("/grpc.health.v1.Health/Watch", "/grpc.reflection.")
"""Streams that end only when told; they must not hold up a drain."""
LARGEST_ANSWER = 16 << 20
"""Bytes of one message that our clients take."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600, 3600)


class Tokens:
    """Bearer tokens, known by hash alone: {sha256 hex: name}."""

    def __init__(self, hashes: dict[str, str]) -> None:
        self._hashes = hashes

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Reads lines "sha256-hex name"; ValueError names the bad line."""
        hashes: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            if len(words) != 2 or len(words[0]) != 64 or any(c not in "0123456789abcdef" for c in words[0]):
                raise ValueError(f"line {number}: accepted: '<sha256 of the token in hex> <name>'")
            hashes[words[0]] = words[1]
        if not hashes:
            raise ValueError("holds no token; accepted: lines '<sha256 of the token in hex> <name>'")
        return cls(hashes)

    def names(self) -> list[str]:
        """Whose tokens they are."""
        return sorted(set(self._hashes.values()))

    def name_of(self, token: str) -> str | None:
        """Whose token it is; compares with every hash in constant time."""
        given = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for known, name in self._hashes.items():
            if hmac.compare_digest(known, given):
                found = name
        return found


def fault_of(error: BaseException) -> Fault:
    """Any exception as a Fault that a caller may see."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full("serving the call")
    ident = telemetry.log_id()
    log.error("unexpected error %s", ident, exc_info=error, extra={"fields": {"log_id": ident}})
    message = f"internal error; see log id {ident} in the daemon's log"
    return Fault(errors_pb2.REASON_INTERNAL, message, metadata={"log_id": ident})


def _shutting_down() -> Fault:
    return Fault(errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down", retry_seconds=2.0)


async def abort(context: Any, status: status_pb2.Status) -> None:
    """Ends the call with a rich status."""
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(_CODES[status.code], status.message, details)


class Door(grpc.aio.ServerInterceptor):
    """The one interceptor: measures, authenticates, maps errors."""

    def __init__(
        self,
        registry: CollectorRegistry,
        tokens: Tokens | None,
        draining: Callable[[], bool],
        largest: int = LARGEST_ANSWER,
    ) -> None:
        self._tokens = tokens
        self._largest = largest
        self._draining = draining
        self._standing: set[asyncio.Task[Any]] = set()
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter("grpc_server_started", "Calls begun.", labels, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", (*labels, "grpc_code"), registry=registry)
        self._received = Counter("grpc_server_msg_received", "Messages in.", labels, registry=registry)
        self._sent = Counter("grpc_server_msg_sent", "Messages out.", labels, registry=registry)
        self._bytes_in = Counter("qlorad_rpc_received_bytes", "Message bytes in.", labels, registry=registry)
        self._bytes_out = Counter("qlorad_rpc_sent_bytes", "Message bytes out.", labels, registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "Seconds a call.", labels, registry=registry, buckets=_BUCKETS
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        metadata = dict(handler_call_details.invocation_metadata or ())
        if handler is None:  # one label for all of them: strangers must not make series
            call = _Call(self, method, metadata, ("unary", "unknown", "unknown"))
            return grpc.stream_stream_rpc_method_handler(call.absent)
        service, _, name = method.removeprefix("/").rpartition("/")
        shape = (bool(handler.request_streaming), bool(handler.response_streaming))
        kind, attribute, make, many = _SHAPES[shape]
        call = _Call(self, method, metadata, (kind, service, name))
        inner = getattr(handler, attribute)
        wrapped = call.streaming(inner) if many else call.single(inner)
        return make(wrapped, _reading(handler.request_deserializer), handler.response_serializer)

    def admit(self, method: str, metadata: dict[str, Any]) -> str:
        """Who calls; UNAUTHENTICATED if tokens are asked for and none is right."""
        if self._draining() and not method.startswith(OPEN_PREFIXES):
            raise _shutting_down()
        if self._tokens is None or method.startswith(OPEN_PREFIXES):
            return ""
        given = str(metadata.get("authorization", ""))
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Fault(
                errors_pb2.REASON_UNAUTHENTICATED,
                "no bearer token was given; accepted: metadata 'authorization: Bearer TOKEN'",
            )
        name = self._tokens.name_of(token)
        if name is None:
            raise Fault(errors_pb2.REASON_UNAUTHENTICATED, "the bearer token is not known here")
        return name

    def end_standing(self) -> None:
        """Ends health watches and reflection streams, which would stay open for ever."""
        for task in self._standing:
            task.cancel()


_SHAPES: Mapping[tuple[bool, bool], tuple[str, str, Callable[..., Any], bool]] = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler, False),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler, False),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler, True),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler, True),
}


class _Call:
    """One call on its way through the door."""

    def __init__(self, door: Door, method: str, metadata: dict[str, Any], labels: tuple[str, str, str]) -> None:
        self._door = door
        self._method = method
        self._metadata = metadata
        self._labels = labels

    def single(self, inner: Callable[..., Any]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Around a call with one answer."""

        async def run(request: Any, context: Any) -> Any:
            async with _Passage(self, request, context) as passage:
                answer = await inner(passage.requests(request), context)
                passage.count_out(passage.size_of(answer))
                return answer

        return run

    def streaming(self, inner: Callable[..., Any]) -> Callable[[Any, Any], Awaitable[None]]:
        """Around a call with many answers; also where the servicer writes by itself.

        Writes the answers itself instead of being a generator: so a caller who
        goes away ends the servicer's `finally` here and now, not when garbage
        is collected.
        """

        async def run(request: Any, context: Any) -> None:
            async with _Passage(self, request, context) as passage:
                answers = inner(passage.requests(request), context)
                if not hasattr(answers, "__aiter__"):
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        size = passage.size_of(answer)
                        await context.write(answer)
                        passage.count_out(size)

        return run

    async def absent(self, request: Any, context: Any) -> None:
        """Answers a method that nobody serves."""
        async with _Passage(self, None, context):
            raise Fault(errors_pb2.REASON_UNIMPLEMENTED, f"{show(self._method)} is not served here")


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Bytes in the place of a message; refused inside the call, where a refusal has its form."""

    size: int
    accepted: str


def _reading(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """As `parse`, but what is no message is no exception: gRPC would answer that with UNKNOWN."""
    if parse is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except (DecodeError, ValueError):
            return _Malformed(len(data), "a message in the contract's encoding")

    return read


class _Passage:
    """Measures and maps what happens inside."""

    def __init__(self, call: _Call, request: Any, context: Any) -> None:
        self._call = call
        self._door = call._door
        self._context = context
        self._begun = time.monotonic()
        self._request_id = str(getattr(request, "request_id", "") or call._metadata.get("x-request-id", ""))[:128]
        self._scope = contextlib.ExitStack()

    def requests(self, request: Any) -> Any:
        """The request, or the stream of them, counted."""
        if not hasattr(request, "__aiter__"):
            self._count_in(request)
            return request

        async def counted() -> AsyncIterator[Any]:
            async for message in request:
                self._count_in(message)
                yield message

        return counted()

    def _count_in(self, message: Any) -> None:
        if isinstance(message, _Malformed):
            raise invalid([Violation("request", f"{message.size} bytes that are no such message", message.accepted)])
        self._door._received.labels(*self._call._labels).inc()
        self._door._bytes_in.labels(*self._call._labels).inc(message.ByteSize())

    def size_of(self, message: Any) -> int:
        """Bytes of an answer; TOO_LARGE if no client would take it."""
        size: int = message.ByteSize()
        if size > self._door._largest:
            told = f"the answer would be {size} bytes; accepted: at most {self._door._largest}; ask for less at a time"
            raise Fault(errors_pb2.REASON_TOO_LARGE, told)
        return size

    def count_out(self, size: int) -> None:
        """Counts an answer of so many bytes."""
        self._door._sent.labels(*self._call._labels).inc()
        self._door._bytes_out.labels(*self._call._labels).inc(size)

    async def __aenter__(self) -> _Passage:
        self._door._started.labels(*self._call._labels).inc()
        try:
            who = self._door.admit(self._call._method, self._call._metadata)
        except Fault as fault:
            await self._end(fault)
            raise
        self._scope.enter_context(telemetry.context(rpc=self._call._method, request_id=self._request_id, caller=who))
        self._scope.enter_context(caller.calling(who))
        task = asyncio.current_task()
        if task is not None and self._call._method.startswith(STANDING_PREFIXES):
            self._door._standing.add(task)
            self._scope.callback(self._door._standing.discard, task)
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._scope:
            await self._end(error)

    async def _end(self, error: BaseException | None) -> None:
        status = None
        if isinstance(error, asyncio.CancelledError) and asyncio.current_task() in self._door._standing:
            error = _shutting_down() if self._door._draining() else error
        if isinstance(error, asyncio.CancelledError):
            # A caller leaves by itself when its deadline comes, a moment before ours does.
            left = self._context.time_remaining()
            code = "CANCELLED" if left is None or left > 0.1 else "DEADLINE_EXCEEDED"
        elif error is None or isinstance(error, grpc.aio.AbortError):
            told = self._context.code()  # a number, or what the servicer itself set
            code = told.name if isinstance(told, grpc.StatusCode) else _CODES[int(told or 0)].name
        else:
            status = to_status(fault_of(error))
            code = _CODES[status.code].name
        self._door._handled.labels(*self._call._labels, code).inc()
        self._door._seconds.labels(*self._call._labels).observe(time.monotonic() - self._begun)
        if status is not None:
            log.info("%s answered %s: %s", self._call._method, code, status.message)
            await abort(self._context, status)
