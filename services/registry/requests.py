"""request_id for calls whose effect lies in the store, not in SQLite.

Law of this room: the id is noted before the effect and answered after it. A
call that was cut in between may run again: its effect must then recognise
itself, which `again` tells.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from services.common import idempotency
from services.common.store import Store

M = TypeVar("M", bound=Message)
_ANSWERED = b"\x01"  # before every answer, since an answer may be no bytes at all


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a request at its start."""

    answer: bytes | None
    """The noted answer, if there is one."""
    again: bool
    """Whether the same request began before."""


class Requests:
    """Answers by request_id, kept over restarts."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, method: str, request_id: str, body: bytes) -> Begun:
        """Notes that a request begins, or finds its answer; REQUEST_ID_REUSED if the body differs."""

        def go(db: sqlite3.Connection) -> Begun:
            known = idempotency.recall(db, method, request_id, body)
            if known is None:
                idempotency.note(db, method, request_id, body, b"")
                return Begun(None, again=False)
            return Begun(known.removeprefix(_ANSWERED) if known else None, again=True)

        return await self._store.run(go)

    async def finish(self, method: str, request_id: str, answer: Message) -> None:
        """Notes the answer of a request that began."""
        data = _ANSWERED + answer.SerializeToString()

        def go(db: sqlite3.Connection) -> None:
            db.execute("UPDATE requests SET answer = ? WHERE method = ? AND request_id = ?", (data, method, request_id))

        await self._store.run(go)

    async def once(
        self, method: str, request_id: str, body: bytes, work: Callable[[bool], Awaitable[M]], kind: type[M]
    ) -> M:
        """The noted answer, or that of `work`, which is told whether the request began before."""
        begun = await self.begin(method, request_id, body)
        if begun.answer is not None:
            return kind.FromString(begun.answer)
        answer = await work(begun.again)
        await self.finish(method, request_id, answer)
        return answer
