"""A client for one command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlorad.client import Client


@contextlib.contextmanager
def connected() -> Iterator[Client]:
    """A client of the house that the environment names; closed at the end."""
    from qlorad.client import connect

    with connect() as client:
        yield client


def pairs(given: list[str], option: str) -> dict[str, str]:
    """KEY=VALUE words as a mapping."""
    from qlorad import errors

    wrong = [word for word in given if "=" not in word]
    if wrong:
        raise errors.invalid(option, wrong[0], "KEY=VALUE")
    return {key: value for key, _, value in (word.partition("=") for word in given)}
