"""A worker's log as a stream: whole lines, nothing twice, no credential, an end."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Fault
from services.trainer import logs

SECRET = "Authorization: Bearer abcdefghijklmnop"


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_whatever_the_writes_the_pieces_are_the_file(pieces: list[bytes]) -> None:
    whole, told, at = b"".join(pieces), b"", 0
    for end in range(len(whole) + 1):
        piece = logs.whole_lines(whole[at:end], False)
        assert piece == b"" or piece.endswith(b"\n")
        told, at = told + piece, at + len(piece)
    assert told + logs.whole_lines(whole[at:], True) == whole


async def read(path: pathlib.Path, offset: int, follow: bool, over_after: int) -> list[tuple[str, int]]:
    looks = 0

    async def is_over() -> bool:
        nonlocal looks
        looks += 1
        if looks > over_after:
            return True
        with path.open("a") as out:
            out.write(f"line {looks}\n{SECRET[: 10 * looks]}" if looks < over_after else "\nlast")
        return looks >= over_after

    return [piece async for piece in logs.lines(path, offset, follow, is_over)]


def test_it_is_followed_to_the_end_of_the_attempt(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"begin\n{SECRET}\n")
    found = asyncio.run(read(path, 0, True, 3))
    text = "".join(t for t, _ in found)
    assert "abcdefgh" not in text and "[redacted]" in text
    assert text.startswith("begin\n") and text.endswith("last") and "line 1" in text and "line 2" in text
    assert found[-1][1] == path.stat().st_size
    assert [a for _, a in found] == sorted({a for _, a in found})
    again = asyncio.run(read(path, found[0][1], False, 9))
    assert "".join(t for t, _ in again) == "".join(t for t, _ in found[1:]), "goes on where it was"


def test_a_log_that_is_not_there_yet_is_empty_and_one_may_not_begin_beyond_it(tmp_path: pathlib.Path) -> None:
    async def over() -> bool:
        return True

    async def read_all(offset: int) -> list[tuple[str, int]]:
        return [piece async for piece in logs.lines(tmp_path / "none", offset, True, over)]

    assert asyncio.run(read_all(0)) == []
    with pytest.raises(Fault, match="accepted: 0 to 0"):
        asyncio.run(read_all(7))


def test_a_line_longer_than_a_piece_is_cut_at_a_blank() -> None:
    long = b"x" * 1000 + b" " + b"y" * logs.READ_BYTES
    piece = logs.whole_lines(long[: logs.READ_BYTES], False)
    assert piece == b"x" * 1000 + b" "
    assert logs.whole_lines(b"z" * logs.READ_BYTES, False) == b"z" * logs.READ_BYTES
