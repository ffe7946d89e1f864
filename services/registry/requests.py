"""request_id for calls whose effect lies in the store, not in SQLite.

Law of this room: the id is noted before the effect and answered after it. A
call that was cut in between may run again: its effect must then recognise
itself, which `Begun.again` tells.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from services.common import idempotency
from services.common.store import Store


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a request at its start."""

    answer: bytes
    """The noted answer; empty if there is none yet."""
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
            if known is not None:
                return Begun(known, again=True)
            idempotency.note(db, method, request_id, body, b"")
            return Begun(b"", again=False)

        return await self._store.run(go)

    async def finish(self, method: str, request_id: str, answer: bytes) -> None:
        """Notes the answer of a request that began."""

        def go(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE requests SET answer = ? WHERE method = ? AND request_id = ?", (answer, method, request_id)
            )

        await self._store.run(go)
