"""Patterns of paths: `*`, `?`, `[…]`, and `**` across folders.

Law of this room: pure, and in time the product of both lengths at most, since
patterns and paths come from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def matching(pattern: str, paths: Iterable[str]) -> Iterator[str]:
    """The paths that a pattern matches whole."""
    tokens = _TOKEN.findall(pattern)
    return (path for path in paths if _matches(tokens, path))


def _matches(tokens: list[str], path: str) -> bool:
    # The places in the path that the tokens so far may have come to.
    at = {0}
    for token in tokens:
        at = set(_on(token, at, path))
        if not at:
            return False
    return len(path) in at


def _on(token: str, at: set[int], path: str) -> Iterator[int]:
    first = min(at)
    if token == "**":
        return iter(range(first, len(path) + 1))
    if token == "**/":  # no folder, or any
        return (i for i in range(first, len(path) + 1) if i in at or path[i - 1 : i] == "/")
    if token == "*":
        return _within(at, path)
    return (i + 1 for i in at if i < len(path) and _is_one(token, path[i]))


def _within(at: set[int], path: str) -> Iterator[int]:
    reached = False
    for i in range(len(path) + 1):
        reached = i in at or (reached and path[i - 1] != "/")
        if reached:
            yield i


def _is_one(token: str, letter: str) -> bool:
    if token == "?":
        return letter != "/"
    if len(token) < 3:
        return token == letter
    body, is_not = (token[2:-1], True) if token[1] == "!" else (token[1:-1], False)
    return letter != "/" and _in_class(body, letter) != is_not


def _in_class(body: str, letter: str) -> bool:
    i = 0
    while i < len(body):
        if body[i + 1 : i + 2] == "-" and i + 2 < len(body):
            if body[i] <= letter <= body[i + 2]:
                return True
            i += 3
        elif body[i] == letter:
            return True
        else:
            i += 1
    return False
