"""Frames: how a daemon and its worker talk.

Law of this room: a frame is length (u32, little-endian), crc32 of the body
(u32), body. On a socket a bad frame ends the talk; at the end of a file a torn
frame is simply not there yet. Bodies are protos of services.common.frames.v1.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib

_HEAD = struct.Struct("<II")
_SEED = 0x716C6F72  # so that zeros, which a power cut may leave at a file's end, are no empty frames
MAX_FRAME = 64 << 20


class BadFrame(Exception):
    """A frame whose length or checksum is wrong."""


def pack(body: bytes) -> bytes:
    """The frame around a body."""
    if len(body) > MAX_FRAME:
        raise BadFrame(f"{len(body)} bytes; accepted: at most {MAX_FRAME}")
    return _HEAD.pack(len(body), zlib.crc32(body, _SEED)) + body


def _head(data: bytes) -> tuple[int, int]:
    size, crc = _HEAD.unpack(data)
    if size > MAX_FRAME:
        raise BadFrame(f"{size} bytes; accepted: at most {MAX_FRAME}")
    return size, crc


def _check(body: bytes, crc: int) -> bytes:
    if zlib.crc32(body, _SEED) != crc:
        raise BadFrame("checksum differs")
    return body


def unpack_all(data: bytes) -> tuple[list[bytes], int]:
    """Whole frames at the beginning of `data` and how many bytes they took."""
    bodies: list[bytes] = []
    at = 0
    while len(data) - at >= _HEAD.size:
        size, crc = _head(data[at : at + _HEAD.size])
        end = at + _HEAD.size + size
        if end > len(data):
            break
        bodies.append(_check(data[at + _HEAD.size : end], crc))
        at = end
    return bodies, at


async def read(reader: asyncio.StreamReader) -> bytes | None:
    """The next body from a stream; None at its end."""
    try:
        size, crc = _head(await reader.readexactly(_HEAD.size))
        return _check(await reader.readexactly(size), crc)
    except asyncio.IncompleteReadError:
        return None


class Line:
    """The worker's end of the socket: blocking, for plain threads."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Ends the talk from this side."""
        self._socket.close()

    def send(self, body: bytes) -> None:
        """Sends one frame."""
        self._socket.sendall(pack(body))

    def receive(self) -> bytes | None:
        """Waits for one frame; None when the daemon is gone."""
        head = self._exactly(_HEAD.size)
        if head is None:
            return None
        size, crc = _head(head)
        body = self._exactly(size)
        return None if body is None else _check(body, crc)

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                piece = self._socket.recv(min(count - len(parts), 1 << 20))
            except ConnectionResetError:
                return None
            if not piece:
                return None
            parts += piece
        return bytes(parts)
