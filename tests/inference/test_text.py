"""Tokens to text: joined pieces are the whole, nothing is torn, stops hold at any border."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.inference.text import TORN, Detokeniser, StopFilter

# A byte-level tokenizer in small: token n < 256 is the byte n, the others are words.
WORDS = [b" the", b" def", "é".encode(), "தமிழ்".encode()[:4], "👩‍👧".encode()[2:9], b"\n\n", "�".encode()]


def decode(ids: Sequence[int]) -> str:
    return b"".join(bytes([i]) if i < 256 else WORDS[i - 256] for i in ids).decode(errors="replace")


def strip_first_blank(ids: Sequence[int]) -> str:
    """As tokenizers that drop the blank a text begins with."""
    return decode(ids).removeprefix(" ")


tokens = st.lists(st.integers(0, 255 + len(WORDS)), max_size=40)
texts = st.text(st.sampled_from("abé த👩\n"), max_size=30)


@given(tokens, tokens)
def test_pieces_joined_are_the_decoded_whole(context: list[int], ids: list[int]) -> None:
    context = list(decode(context).encode())  # a prompt is whole text
    stream = Detokeniser(decode, tuple(context))
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == decode(ids)


@given(texts)
def test_no_piece_is_torn_and_all_comes_out_at_once_where_it_can(text: str) -> None:
    stream = Detokeniser(decode)
    seen = ""
    for at, byte in enumerate(text.encode(), start=1):
        piece = stream.push(byte)
        assert TORN not in piece
        seen += piece
        assert seen == text.encode()[:at].decode(errors="ignore")


def test_a_blank_that_a_tokenizer_drops_at_the_beginning_of_a_text_is_kept_behind_a_prompt() -> None:
    stream = Detokeniser(strip_first_blank, tuple(b"def"))
    assert stream.push(256) + stream.push(257) == " the def"
    stream = Detokeniser(strip_first_blank)
    assert stream.push(256) + stream.push(257) == "the def"


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """What a StopFilter promises, found the slow way: character by character."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stops_hold_wherever_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    keeper, out, stopped = StopFilter(tuple(stops)), "", False
    for begin, end in itertools.pairwise(borders):
        piece, stopped = keeper.push(text[begin:end])
        out += piece
        if stopped:
            break
    expected, expected_stop = cut(text, stops)
    assert (out if stopped else out + keeper.flush(), stopped) == (expected, expected_stop)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_held_back_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    keeper, out = StopFilter(tuple(stops)), ""
    for at, character in enumerate(text, start=1):
        piece, stopped = keeper.push(character)
        if stopped:
            return
        out += piece
        held = text[len(out) : at]
        assert held == "" or any(stop.startswith(held) for stop in stops)
