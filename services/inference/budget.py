"""Who makes room: the decision behind every byte budget of the daemon.

Law of this room: pure; sizes, last use and holds in, a verdict out. What is held
never leaves; of the rest, what was used longest ago leaves first, and nothing
leaves that could have stayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlorad.v1 import errors_pb2
from services.common.errors import Fault


@dataclass(frozen=True, slots=True)
class Item:
    """Something in memory."""

    key: str
    name: str
    """As people call it."""
    bytes: int
    used_at: float
    pinned: bool = False
    busy: str = ""
    """What keeps it now, as in "2 requests"; empty = nothing."""
    requests: int = 0
    """How many requests use it, if it is only they that keep it: without new ones it would be free."""
    leaves: bool = False
    """It takes no new requests, and leaves with its last."""

    @property
    def is_free(self) -> bool:
        """Whether it may leave."""
        return not self.pinned and not self.busy

    def story(self) -> str:
        """Why it stands in the way."""
        why = ", ".join(filter(None, ("pinned" if self.pinned else "", self.busy)))
        return f"{self.name} ({self.bytes} bytes; {why})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What must leave so that something fits, or what stands in its way."""

    fits: bool
    leave: tuple[str, ...] = ()
    """Keys, used longest ago first; none if it does not fit."""
    in_the_way: tuple[Item, ...] = ()
    """What is held, largest first; none if it fits."""
    may_fit_later: bool = False
    """It would fit once what is only busy is not busy any more."""


def decide(items: Sequence[Item], need: int, limit: int) -> Verdict:
    """Room for `need` bytes beside `items` under `limit`; a limit of 0 bounds nothing."""
    if limit == 0:
        return Verdict(True)
    over = sum(i.bytes for i in items) + need - limit
    leave: list[Item] = []
    for item in sorted((i for i in items if i.is_free), key=lambda i: i.used_at):
        if over <= 0:
            break
        leave.append(item)
        over -= item.bytes
    if over > 0:
        held = sorted((i for i in items if not i.is_free), key=lambda i: -i.bytes)
        stays = sum(i.bytes for i in items if i.pinned)
        return Verdict(False, in_the_way=tuple(held), may_fit_later=stays + need <= limit)
    # One large thing that left may have made others' leaving needless; what was used last stays first.
    for item in reversed(leave[:]):
        if over + item.bytes <= 0:
            leave.remove(item)
            over += item.bytes
    return Verdict(True, tuple(i.key for i in leave))


def close(items: Sequence[Item], need: int, limit: int) -> tuple[str, ...]:
    """Which items must take no new requests so that `need` bytes come free, beside what is free or leaves anyway.

    Those with the fewest requests, and of these what was used longest ago; all there are, if that is not enough.
    """
    if limit == 0:
        return ()
    over = sum(i.bytes for i in items if not (i.is_free or i.leaves)) + need - limit
    closed: list[str] = []
    for item in sorted((i for i in items if i.requests and not i.pinned), key=lambda i: (i.requests, i.used_at)):
        if over <= 0:
            break
        closed.append(item.key)
        over -= item.bytes
    return tuple(closed)


def too_large(name: str, need: int, limit: int, setting: str, verdict: Verdict, retry_seconds: float = 5.0) -> Fault:
    """TOO_LARGE, naming what stands in the way; with a hint to retry where waiting can help."""
    held = ", ".join(i.story() for i in verdict.in_the_way)
    way = f"; in the way: {held}" if held else ""
    return Fault(
        errors_pb2.REASON_TOO_LARGE,
        f"{name} takes {need} bytes; accepted: what fits into {setting} of {limit} bytes{way}",
        resource=name,
        blockers=tuple((i.name, i.story()) for i in verdict.in_the_way),
        retry_seconds=retry_seconds if verdict.may_fit_later else 0.0,
    )
