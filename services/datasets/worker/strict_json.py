"""JSON as rows may hold it: bounded, without twins, with text that is text.

Law of this room: pure. What Python's parser would let pass in silence (a key
twice, NaN, half a surrogate pair) is a named problem here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from services.datasets import repairs
from services.datasets.worker.found import Problem, clip

MAX_DEPTH = 24
_DIGITS = b"0123456789"
EXACT = 1 << 53
LONG_BYTES = 1 << 16
_OBJECT_BYTES = 100
"""Of the largest value that takes one comma or bracket."""
_LONG_NUMBER = re.compile(rb"[0-9]{16}")


def parsed(line: bytes) -> Any:
    """A line as orjson has it. MemoryError where a long one may need more than there is: orjson would crash."""
    if len(line) > LONG_BYTES:
        bytes(2 * len(line) + _OBJECT_BYTES * (line.count(b",") + line.count(b"[") + line.count(b"{")))
    return orjson.loads(line)


def quick(line: bytes) -> Any:
    """The object on a line, where nothing about it needs a closer look; None where StrictJson must say.

    A key twice shows in the count of colons: each key has one, and every colon
    that is no key's stands inside a text. Numbers of sixteen digits might be rounded
    (a whole number beyond what is exact may come as a float), escapes might hide
    what is no text, many brackets might be deep.
    """
    try:
        value = parsed(line)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict or (b"\\" in line and b"\\u" in line):
        return None
    keys = len(value)
    for inner in value.values():
        kind = type(inner)
        if kind is str:
            continue
        if kind is float and not -EXACT < inner < EXACT:
            return None
        if kind is dict or kind is list:
            if line.count(b"{") + line.count(b"[") > MAX_DEPTH and depth(value) > MAX_DEPTH:
                return None
            if len(line) - len(line.translate(None, _DIGITS)) >= 16 and _LONG_NUMBER.search(line):
                return None
            keys = _keys(value)
            break
    if line.count(b":") != keys and (line.count(b'":') != keys or has_blank_colon(line)):
        return None
    return value


def _keys(value: Any) -> int:
    if type(value) is dict:
        return len(value) + sum(_keys(v) for v in value.values() if type(v) is dict or type(v) is list)
    return sum(_keys(v) for v in value if type(v) is dict or type(v) is list)


def has_blank_colon(line: bytes) -> bool:
    """Whether a quote and a colon may stand apart, so that counting both together misses a key."""
    return b'" ' in line or b'"\t' in line or b'"\r' in line or b'"\n' in line


class StrictJson:
    """A parser that remembers what was wrong with the value it parsed last.

    Does not raise for what leaves the text readable, so that a reader of many
    values can go on behind a bad one.
    """

    def __init__(self) -> None:
        self._seen: Problem | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs) and self._seen is None:
            names = [k for k, _ in pairs]
            twin = next(k for i, k in enumerate(names) if k in names[:i])
            self._seen = Problem("twin_key", f"the key {clip(twin)} stands twice in one object", "keep one", clip(twin))
        return made

    def _constant(self, name: str) -> float:
        if self._seen is None:
            self._seen = Problem("broken_json", f"{name} is not JSON", "use null or a finite number")
        return 0.0

    def decode(self, text: str, at: int = 0) -> tuple[Any, int, Problem | None]:
        """The value that begins at `at`, where it ends, and what is wrong with it.

        Raises ValueError (json's own) where the text is broken and RecursionError
        where it is nested beyond what the parser can follow.
        """
        self._seen = None
        value, end = self._decoder.raw_decode(text, at)
        if self._seen is not None:
            return value, end, self._seen
        brackets = text.count("{", at, end) + text.count("[", at, end)
        if brackets > MAX_DEPTH and (deep := depth(value)) > MAX_DEPTH:
            return value, end, too_deep(deep)
        if text.find("\\u", at, end) >= 0:
            return value, end, odd_text(value)
        return value, end, None


def too_deep(found: int | None = None) -> Problem:
    """The problem of a value nested too deep."""
    told = f"nested {found} deep" if found else "nested too deep to read"
    return Problem("too_deep", told, f"at most {MAX_DEPTH} levels of lists and objects")


def depth(value: Any) -> int:
    """How deep lists and objects lie in one another; 0 for a plain value."""
    deepest, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        deepest += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return deepest


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a value with its place, keys too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path} (key)".strip(), key
            yield from texts(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from texts(inner, f"{path}[{i}]")


def odd_text(value: Any) -> Problem | None:
    """The first string that is not Unicode text or holds NUL, as a problem."""
    for path, text in texts(value):
        where = path.encode("utf-8", "replace").decode()
        if "\x00" in text:
            told = f"holds NUL at character {text.index(chr(0))}"
            return Problem("nul_character", told, "remove it", where, repair=repairs.NUL_CHARACTERS)
        try:
            text.encode()
        except UnicodeEncodeError as e:
            return Problem(
                "lone_surrogate",
                f"holds half a surrogate pair (U+{ord(text[e.start]):04X}) at character {e.start}, which is not text",
                "write the whole character, or its \\uXXXX\\uXXXX pair",
                where,
                repair=repairs.LONE_SURROGATES,
            )
    return None
