"""Who calls: the name of the token that the door let in.

Law of this room: set by the door alone, read by whoever must know; knows
neither tokens nor gRPC.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")


def name() -> str:
    """The name of the caller's token; empty where no tokens are asked for."""
    return _caller.get()


@contextlib.contextmanager
def calling(who: str) -> Iterator[None]:
    """What happens inside is done for this caller, tasks that begin inside too."""
    before = _caller.set(who)
    try:
        yield
    finally:
        _caller.reset(before)
