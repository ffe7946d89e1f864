"""Torn frames wait, corrupt frames are refused, whole frames come back."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import frames
from services.common.frames import BadFrame, Line

BODIES = st.lists(st.binary(max_size=200), max_size=6)


@given(BODIES, st.data())
def test_a_torn_tail_is_not_there_yet(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frames.pack, bodies))
    cut = data.draw(st.integers(0, len(stream)))
    found, taken = frames.unpack_all(stream[:cut])
    assert found == bodies[: len(found)] and taken <= cut
    rest, _ = frames.unpack_all(stream[taken:])
    assert found + rest == bodies


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit_is_never_taken_for_the_body(body: bytes, data: st.DataObject) -> None:
    stream = bytearray(frames.pack(body))
    at = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[at // 8] ^= 1 << (at % 8)
    try:
        found, _ = frames.unpack_all(bytes(stream))
    except BadFrame:
        return
    assert found == []  # a longer length: the rest has not come yet


def test_zeros_are_no_frames() -> None:
    with pytest.raises(BadFrame):
        frames.unpack_all(frames.pack(b"whole") + b"\0" * 64)
    assert frames.unpack_all(frames.pack(b"")) == ([b""], 8)


def test_a_giant_length_is_refused_at_once() -> None:
    with pytest.raises(BadFrame, match="at most"):
        frames.unpack_all((frames.MAX_FRAME + 1).to_bytes(4, "little") + b"\0" * 4)
    with pytest.raises(BadFrame):
        frames.pack(b"\0" * (frames.MAX_FRAME + 1))


@given(BODIES, st.integers(0, 30))
def test_a_stream_reader_sees_the_same(bodies: list[bytes], cut: int) -> None:
    async def read() -> list[bytes]:
        reader = asyncio.StreamReader()
        stream = b"".join(map(frames.pack, bodies))
        reader.feed_data(stream[: max(0, len(stream) - cut)])
        reader.feed_eof()
        found = []
        while (body := await frames.read(reader)) is not None:
            found.append(body)
        return found

    found = asyncio.run(read())
    assert found == bodies[: len(found)]
    assert cut or found == bodies


def test_a_line_ends_when_the_other_side_is_gone() -> None:
    ours, theirs = socket.socketpair()
    line = Line(theirs.detach())
    ours.sendall(frames.pack(b"one") + frames.pack(b"x" * 100_000)[:500])
    ours.close()
    assert line.receive() == b"one"
    assert line.receive() is None
    with pytest.raises(OSError):
        for _ in range(50):
            line.send(b"y" * 100_000)
    line.close()
