"""From text to token ids and back, with the place of every token in the text.

Law of this room: what the template wrote is encoded as it stands; no special
token is added behind its back. Offsets are exact: a leading blank belongs to
the token that holds it.
"""

from __future__ import annotations

import bisect
import itertools
import json
import pathlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
import tokenizers.models

from services.common.errors import rejected
from services.common.prompt.render import TOKENIZER, read_config, special_tokens


class Encoded:
    """Token ids, and where each stands in the text. Told on demand: lists of offsets cost more than encoding."""

    __slots__ = ("_found",)

    def __init__(self, found: tokenizers.Encoding) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoded) and (self.ids, self.offsets) == (other.ids, other.offsets)

    @property
    def ids(self) -> list[int]:
        """Token ids, a new list each time."""
        found: list[int] = self._found.ids
        return found

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """For each token its first character and the one after its last."""
        found: list[tuple[int, int]] = self._found.offsets
        return found

    def range_of(self, begin: int, end: int) -> tuple[int, int] | None:
        """First token, and the one after the last, of those that share a character with text[begin:end].

        None where a character at the edge belongs to no token, so that only all offsets can tell.
        """
        found = self._found
        first = found.char_to_token(begin)
        last = found.char_to_token(end - 1)
        if first is None or last is None:
            return None
        # Several tokens may spell one character: the last of them counts.
        while last < len(found) and (place := found.token_to_chars(last)) is not None and place[0] < end:
            last += 1
        return first, last


class Spelled:
    """The same where tokens joined are the text, byte for byte: places follow from how many bytes each spells."""

    __slots__ = ("_begins", "_text", "ids")

    def __init__(self, text: str, ids: list[int], begins: list[int]) -> None:
        self.ids = ids
        self._text = text
        self._begins = begins
        """The byte at which each token begins, and the number of all bytes."""

    def __len__(self) -> int:
        return len(self.ids)

    def range_of(self, begin: int, end: int) -> tuple[int, int]:
        """As Encoded tells it."""
        if not self._text.isascii():
            begin, end = len(self._text[:begin].encode()), len(self._text[:end].encode())
        return bisect.bisect_right(self._begins, begin) - 1, bisect.bisect_left(self._begins, end)


@dataclass(frozen=True, slots=True)
class Infill:
    """How a model was taught to fill gaps: its own tokens, as text."""

    prefix: str
    suffix: str
    middle: str
    end: str
    """Ends the middle; empty where the end token does."""


_INFILLS = (
    Infill("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"),
    Infill("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ""),
    Infill("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ""),
    Infill("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ""),
    Infill("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>", ""),
)
INFILL_TOKENS = "; ".join(" ".join((i.prefix, i.suffix, i.middle)) for i in _INFILLS)
"""What is looked for, for people."""


class Tokenizer:
    """The tokenizer of one model. Safe to share between threads; holds no settings that calls change."""

    __slots__ = (
        "_added",
        "_byte_level",
        "_bytes",
        "_composes",
        "_tokenizer",
        "_widths",
        "eos_id",
        "infill",
        "lead_ids",
    )

    eos_id: int | None
    """The end token that tokenizer_config.json names; None if it names none."""
    lead_ids: tuple[int, ...]
    """What the tokenizer's own post-processor sets before a plain text, as a BOS; often nothing.
    Chat templates write it themselves; plain prompts get it through encode_prompt."""
    infill: Infill | None
    """The model's tokens for gaps; None if it has none of those that are known."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token: str | None) -> None:
        # A file may carry the settings of the run that saved it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.lead_ids = _lead(tokenizer)
        # From here on the post-processor would only trim blanks out of offsets.
        tokenizer.post_processor = None
        self._tokenizer = tokenizer
        self.eos_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        known = set(self._added.values())
        self.infill = next((i for i in _INFILLS if {i.prefix, i.suffix, i.middle} <= known), None)
        if self.infill is not None and self.infill.end not in known:
            self.infill = replace(self.infill, end="")
        self._byte_level = _is_byte_level(tokenizer)
        self._composes = tokenizer.normalizer is not None
        self._widths: list[int] | None = None
        self._bytes = _bytes_of_characters()

    @classmethod
    def open(cls, payload: pathlib.Path) -> Tokenizer:
        """The tokenizer of a model folder; REJECTED if its file is not one."""
        path = payload / TOKENIZER
        if not path.is_file():
            raise rejected(TOKENIZER, "is missing; a fast tokenizer's file is needed")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing narrower
            raise rejected(TOKENIZER, f"cannot be read: {e}") from None
        return cls(tokenizer, special_tokens(payload, read_config(payload)).get("eos_token"))

    @property
    def vocabulary(self) -> int:
        """Number of ids, added tokens included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    def encode(self, text: str) -> Encoded:
        """The text as ids, nothing added."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoded(found)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Many texts, each as encode gives it."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(e) for e in found]

    def encode_many(self, texts: Sequence[str]) -> Sequence[Encoded | Spelled]:
        """Many texts, each as encode gives it, by the quicker way where that is certain to give the same."""
        if self._widths is None:
            self._widths = self._count_bytes() if _spells(self._tokenizer) else []
        if not self._widths:
            return self.encode_batch(texts)
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        width = self._widths.__getitem__
        return [self._spelled(text, e.ids, width) for text, e in zip(texts, found, strict=True)]

    def _spelled(self, text: str, ids: list[int], width: Callable[[int], int]) -> Encoded | Spelled:
        begins = list(itertools.accumulate(map(width, ids), initial=0))
        plain = text.isascii()
        sure = begins[-1] == (len(text) if plain else len(text.encode()))
        if sure and (plain or not self._composes or unicodedata.is_normalized("NFC", text)):
            return Spelled(text, ids, begins)
        return self.encode(text)

    def _count_bytes(self) -> list[int]:
        """How many bytes each id spells; in byte-level vocabularies a character stands for a byte."""
        vocabulary = self._tokenizer.get_vocab()
        widths = [0] * (max(vocabulary.values(), default=0) + 1)
        for token, number in vocabulary.items():
            widths[number] = len(token)
        for number, content in self._added.items():
            widths[number] = len(content.encode())
        return widths

    def encode_prompt(self, prompt: str) -> list[int]:
        """A plain prompt (no chat) as a model is trained on it: lead_ids, then the text."""
        return [*self.lead_ids, *self.encode(prompt).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def bytes_of(self) -> Callable[[int], bytes] | None:
        """What each id adds to a text that goes on, as bytes; None where that depends on what stands beside it.

        So it does not in byte-level vocabularies, and in those of pieces with bytes for what they lack. Joined
        and read as UTF-8 they are what `decode` gives; only, of pieces, a bad byte is U+FFFD alone, where
        `decode` takes all bytes beside it for bad too. Knows nothing of a blank that begins a text.
        """
        told = _state(self._tokenizer.decoder)
        steps = told.get("decoders", [told])
        if [s.get("type") for s in steps] == ["ByteLevel"]:
            return self._of_characters
        if steps[:2] == _PIECES and all(s.get("type") == "Fuse" or _strips_the_start(s) for s in steps[2:]):
            return self._of_pieces
        return None

    def _of_characters(self, ident: int) -> bytes:
        token = self._tokenizer.id_to_token(ident) or ""
        try:
            return b"".join([self._bytes[c] for c in token])
        except KeyError:  # an added token is its own text, unless it can be read as bytes
            return str(token).encode()

    def _of_pieces(self, ident: int) -> bytes:
        token = str(self._tokenizer.id_to_token(ident) or "")
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as text for people; bytes that are no whole character as <0xE0>."""
        return [self._piece(i) for i in ids]

    def _piece(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"<{token_id}?>"
        if not self._byte_level:
            return str(token).replace("\u2581", " ")
        raw = bytes(b for c in token for b in self._bytes.get(c, c.encode()))
        escaped = raw.decode(errors="surrogateescape")
        return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in escaped)


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_PIECES: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
]
"""How decoders of pieces with bytes begin."""


def _strips_the_start(step: Mapping[str, Any]) -> bool:
    """Whether a decoder's step takes away blanks at the start of a text, and nothing else."""
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("stop") == 0


def _lead(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    found = tokenizer.encode("a", add_special_tokens=True)
    lead = []
    for token_id, added in zip(found.ids, found.special_tokens_mask, strict=True):
        if not added:
            break
        lead.append(token_id)
    return tuple(lead)


def _spells(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether tokens joined are the text: byte-level, nothing normalised but NFC, no blank set before, no unknowns."""
    steps = _state(tokenizer.pre_tokenizer)
    levels = [s for s in [steps, *steps.get("pretokenizers", [])] if s.get("type") == "ByteLevel"]
    return (
        _is_byte_level(tokenizer)
        and bool(levels)
        and not any(s.get("add_prefix_space", True) for s in levels)
        and _state(tokenizer.normalizer).get("type", "NFC") == "NFC"
        and isinstance(tokenizer.model, tokenizers.models.BPE)
        and not tokenizer.model.unk_token
    )


def _state(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is, as its file tells it; empty where there is none."""
    told: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return told


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    told = _state(tokenizer.decoder)
    return any(d.get("type") == "ByteLevel" for d in [told, *told.get("decoders", [])])


def _bytes_of_characters() -> dict[str, bytes]:
    # The alphabet of byte-level BPE: printable Latin-1 stands for itself, the
    # other bytes follow in order from U+0100.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    alphabet = {chr(b): bytes([b]) for b in printable}
    alphabet.update({chr(0x100 + n): bytes([b]) for n, b in enumerate(others)})
    return alphabet
