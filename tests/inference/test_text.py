"""Tokens to text: joined pieces are the whole, nothing is torn, stops hold at any border."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from services.common.prompt.tokens import Tokenizer
from services.inference.text import TORN, FromBytes, FromText, StopFilter, detokeniser

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
    stream = FromText(decode, tuple(context))
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == decode(ids)


@given(texts)
def test_no_piece_is_torn_and_all_comes_out_at_once_where_it_can(text: str) -> None:
    stream = FromText(decode)
    seen = ""
    for at, byte in enumerate(text.encode(), start=1):
        piece = stream.push(byte)
        assert TORN not in piece
        seen += piece
        assert seen == text.encode()[:at].decode(errors="ignore")


def test_a_blank_that_a_tokenizer_drops_at_the_beginning_of_a_text_is_kept_behind_a_prompt() -> None:
    stream = FromText(strip_first_blank, tuple(b"def"))
    assert stream.push(256) + stream.push(257) == " the def"
    stream = FromText(strip_first_blank)
    assert stream.push(256) + stream.push(257) == "the def"


@given(st.lists(st.sampled_from([0x80, 0xC3, 0xE2, 0xF0, 0x9F, 0xA9, 256, 260]), max_size=200))
@settings(max_examples=60)
def test_what_is_torn_for_long_is_the_decoded_whole_too(ids: list[int]) -> None:
    stream = FromText(decode, tuple(b"def"))
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == decode(ids)


TORN_STREAMS = [[0x80], [0xC3], [0xA9, 0xC3], [0xF0, 0x9F], [262], [10_000]]


@pytest.mark.parametrize("kind", TORN_STREAMS, ids=str)
def test_a_token_costs_the_same_however_long_the_text_was_torn(kind: list[int]) -> None:
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode([i for i in ids if i < 10_000])  # ids that no tokenizer knows say nothing

    stream, ids = FromText(counting, tuple(b"def")), kind * (600 // len(kind))
    joined = "".join([stream.push(i) for i in ids] + [stream.flush()])
    assert joined == decode([i for i in ids if i < 10_000])
    assert decoded < 60 * len(ids)


def alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(0x100 + n) for n, b in enumerate(others)}


def byte_level() -> tokenizers.Tokenizer:
    """Bytes, words that tear characters, and added tokens: some of them look like bytes."""
    told = alphabet()
    words = [told[b] for b in range(256)] + ["".join(told[b] for b in word) for word in WORDS]
    made = tokenizers.Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<\uff5cend\uff5c>", "\u00e9"])
    made.add_tokens(["two words", "\u0120the"])
    return made


def pieces(*more: decoders.Decoder) -> tokenizers.Tokenizer:
    """As sentencepiece's: pieces, and a token for each byte that they lack."""
    words = ["<unk>", "\u2581", "\u2581the", "def", "\u00e9", "\u2581<0x41>", "<0x4", TORN]
    vocabulary = {word: n for n, word in enumerate([f"<0x{b:02X}>" for b in range(256)] + words)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), *more])
    made.add_special_tokens(["<s>", "a\u2581b"])
    return made


TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bytes": byte_level,
    "pieces": lambda: pieces(decoders.Fuse()),
    "pieces, first blank dropped": lambda: pieces(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
}


def whole(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """What the library decodes where a bad byte is a token of its own that says U+FFFD.

    Among tokens for bytes the library takes all that stand together for bad if one is.
    """
    known = [token for i in ids if (token := tokenizer.id_to_token(i)) is not None]
    tokens: list[str] = []
    for is_byte, run in itertools.groupby(known, lambda token: len(token) == 6 and token.startswith("<0x")):
        told = list(run)
        if is_byte:
            read = bytes(int(token[3:5], 16) for token in told).decode(errors="replace")
            told = [t for c in read for t in ([c] if c == TORN else [f"<0x{b:02X}>" for b in c.encode()])]
        tokens += told
    text: str = tokenizer.decoder.decode(tokens)
    return text


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@given(st.data())
@settings(max_examples=150)
def test_pieces_joined_are_what_real_tokenizers_decode(kind: str, data: st.DataObject) -> None:
    made = TOKENIZERS[kind]()
    tokenizer = Tokenizer(made, None)
    assert tokenizer.bytes_of() is not None
    odd = st.sampled_from([0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xED, 0xA0])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary + 1) | odd, max_size=40))
    context = made.encode("def the", add_special_tokens=False).ids or [made.token_to_id("def")]
    stream = detokeniser(tokenizer.decode, tokenizer.bytes_of(), context)
    assert isinstance(stream, FromBytes)
    joined = "".join([stream.push(i) for i in ids] + [stream.flush()])
    assert joined == whole(made, [*context, *ids])[len(whole(made, context)) :]
    decoded = tokenizer.decode([*context, *ids])
    if kind == "bytes" or TORN not in decoded:
        assert joined == decoded[len(tokenizer.decode(context)) :]


@given(st.text("a é த👩\n", max_size=30))
@settings(max_examples=40)
def test_whole_characters_of_bytes_come_at_once(text: str) -> None:
    stream = detokeniser(decode, Tokenizer(pieces(decoders.Fuse()), None).bytes_of(), ())
    seen = ""
    for at, byte in enumerate(text.encode(), start=1):
        seen += stream.push(byte)
        assert seen == text.encode()[:at].decode(errors="ignore")


def test_tokenizers_whose_texts_depend_on_what_stands_beside_are_decoded() -> None:
    for other in (
        decoders.WordPiece(), decoders.Metaspace(), decoders.BPEDecoder(), decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("\u2581", " ")]),
    ):  # fmt: skip
        made = byte_level()
        made.decoder = other
        bytes_of = Tokenizer(made, None).bytes_of()
        assert bytes_of is None and isinstance(detokeniser(decode, bytes_of, ()), FromText)


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
