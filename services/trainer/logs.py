"""A worker's log as a stream of whole lines, without what looks like a credential.

Law of this room: reads only. A line is redacted as a whole, so nothing is told
that was cut in the middle of a secret. Offsets are those of the file.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable

from services.common import telemetry
from services.common.errors import invalid_field

READ_BYTES = 64 << 10
LOOK_SECONDS = 0.2


def whole_lines(data: bytes, is_last: bool) -> bytes:
    """What of a piece can be told: up to its last line's end; all of it where no more will come.

    A line longer than a piece is cut at its last blank.
    """
    if is_last:
        return data
    end = data.rfind(b"\n") + 1
    if not end and len(data) >= READ_BYTES:
        end = data.rfind(b" ") + 1 or len(data)
    return data[:end]


async def lines(
    path: pathlib.Path, offset: int, follow: bool, is_over: Callable[[], Awaitable[bool]]
) -> AsyncIterator[tuple[str, int]]:
    """Pieces of a log and where it goes on after each; with `follow` until the attempt is over and all was told."""
    size = await asyncio.to_thread(_size, path)
    if not 0 <= offset <= size:
        raise invalid_field("offset_bytes", offset, f"0 to {size}")
    while True:
        last = not follow or await is_over()  # asked before the read, so that nothing is missed
        data = await asyncio.to_thread(_read, path, offset)
        told = whole_lines(data, last and len(data) < READ_BYTES)
        if told:
            offset += len(told)
            yield telemetry.redact(told.decode(errors="replace")), offset
        elif last:
            return
        else:
            await asyncio.sleep(LOOK_SECONDS)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: pathlib.Path, offset: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as f:
        f.seek(offset)
        return f.read(READ_BYTES)
