"""Pages of lists that change while they are read.

Law of this room: pure. A token names the last item told, so nothing that stays
is told twice or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from services.common import names
from services.common.errors import invalid_field

T = TypeVar("T")


def page(items: Iterable[T], key: Callable[[T], tuple[int, str]], size: int, token: str) -> tuple[list[T], str]:
    """A page, newest first, and the token of the next one; `key` gives nanoseconds and name."""
    count = names.page_size(size)
    ordered = sorted(items, key=lambda i: (-key(i)[0], key(i)[1]))
    if token:
        when, _, name = names.page_position(token).partition(" ")
        if not name or not when.lstrip("-").isdigit():
            raise invalid_field("page_token", token, "the next_page_token of the page before")
        after = (-int(when), name)
        ordered = [i for i in ordered if (-key(i)[0], key(i)[1]) > after]
    told = ordered[:count]
    if len(ordered) <= count:
        return told, ""
    when_, name_ = key(told[-1])
    return told, names.page_token(f"{when_} {name_}")
