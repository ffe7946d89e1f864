"""Packed files as streams: gzip and zstd, unpacked a little at a time.

Law of this room: what comes out is counted while it comes out, so a bomb is
refused before it has gone off; a step takes so few bytes in that no step can
give more than a few megabytes. An end that is none is never taken for one.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import zstandard

from services.datasets.worker.found import Problem, Unreadable

MAX_RATIO = 1000
RATIO_FROM_BYTES = 64 << 20
MAX_WINDOW_BYTES = 128 << 20
"""What `zstd -19` and `--long` without a number need; a window is memory."""


class Decoder(Protocol):
    """One member (gzip) or frame (zstd) on its way out."""

    @property
    def eof(self) -> bool:
        """It has come to its end."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What was fed of behind its end."""
        ...

    def decompress(self, data: bytes, /) -> bytes:
        """What comes out of some bytes more."""
        ...


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to pack bytes."""

    name: str
    suffix: str
    piece: int
    """Bytes taken in at a time. Deflate gives at most 1032 bytes for one, a zstd block 128 KiB for four."""
    decoder: Callable[[], Decoder]
    begins: Callable[[bytes], bool]
    """Whether bytes begin a member or frame."""


def _zstd_begins(head: bytes) -> bool:
    # A frame, or one of the frames that carry no data and may stand anywhere between them.
    return head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)


GZIP = Packing("gzip", ".gz", 16 << 10, lambda: zlib.decompressobj(31), lambda head: head[:2] == b"\x1f\x8b")
ZSTD = Packing(
    "zstd",
    ".zst",
    1 << 10,
    lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(),
    _zstd_begins,
)


def packing_of(head: bytes) -> Packing | None:
    """How a file is packed, by its first bytes."""
    return next((p for p in (GZIP, ZSTD) if p.begins(head)), None)


class Damaged(Unreadable):
    """Packed bytes that do not unpack; the row is known to who reads rows."""

    def reached(self, line: int) -> Damaged:
        """The same, with the last line that could be read."""
        if line:
            told = f"{self.problem.message}; the last row that could be read stands on line {line}"
            self.problem = dataclasses.replace(self.problem, message=told)
        self.line = line
        return self


class Unpacked(io.RawIOBase):
    """The unpacked bytes of a packed file. Seeking is only going back to a place already read, from the start."""

    def __init__(self, f: BinaryIO, packing: Packing, max_bytes: int) -> None:
        self._file = f
        self._packing = packing
        self._max_bytes = max_bytes
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._decoder: Decoder | None = self._packing.decoder()
        self._ready = memoryview(b"")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 1:
            offset += self._at
        elif whence == 2:
            raise io.UnsupportedOperation("the end of packed bytes is not known")
        if offset < self._at:
            self._begin()
        while self._at < offset and self.read(min(1 << 16, offset - self._at)):
            pass
        return self._at

    def readinto(self, buffer, /) -> int:
        while not self._ready:
            if not self._step():
                return 0
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        self._at += size
        return size

    def _step(self) -> bool:
        """Unpacks some bytes more; False at the end."""
        data = self._file.read(self._packing.piece)
        if not data:
            if self._decoder is None:
                return False
            raise self._damaged("the file ends in the middle of the packed data; it was cut off")
        if self._decoder is None:
            self._decoder = self._next(data)
            if self._decoder is None:
                return False
        made = self._feed(self._decoder, data)
        if self._decoder.eof:
            # What follows begins the next member, or is none; read it again from there.
            self._file.seek(-len(self._decoder.unused_data), io.SEEK_CUR)
            self._decoder = None
        self._ready = memoryview(made)
        self._check(self._at + len(made))
        return True

    def _next(self, data: bytes) -> Decoder | None:
        if self._packing.begins(data):
            return self._packing.decoder()
        here = self._file.tell() - len(data)
        while data and not data.strip(b"\x00"):  # tapes and blocks are filled up with zeros
            data = self._file.read(self._packing.piece)
        if not data:
            return None
        raise self._damaged(
            f"something that is not {self._packing.name} follows the packed data at byte {here} of the file",
            "trailing_bytes",
        )

    def _feed(self, decoder: Decoder, data: bytes) -> bytes:
        try:
            return decoder.decompress(data)
        except (zlib.error, zstandard.ZstdError) as e:
            if "too much memory" in str(e):
                told = f"it needs a window of more than {MAX_WINDOW_BYTES} bytes"
                hint = "pack it anew with a smaller window, or send it unpacked"
                raise Damaged(Problem("packed_too_large", told, hint)) from None
            raise self._damaged(f"the {self._packing.name} data is damaged ({e})") from None

    def _damaged(self, told: str, rule: str = "broken_packing") -> Damaged:
        return Damaged(Problem(rule, told, "pack the file anew, or send it unpacked"))

    def _check(self, out: int) -> None:
        taken = self._file.tell()
        if out > self._max_bytes:
            told = f"it unpacks to more than {self._max_bytes} bytes"
            raise Damaged(Problem("packed_too_large", told, "a file that unpacks to less, or a larger bound"))
        if out > RATIO_FROM_BYTES and out > MAX_RATIO * taken:
            told = f"{taken} packed bytes unpack to {out} and more, over {MAX_RATIO} times as many"
            raise Damaged(Problem("packed_bomb", told, "send the file unpacked"))
