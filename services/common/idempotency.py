"""request_id: same id and body, same answer, also after a restart.

Law of this room: the answer is noted in the transaction of the effect. Add
`MIGRATION` to a daemon's migrations; call `recall` first and `note` last,
inside one `Store.run`.
"""

from __future__ import annotations

import hashlib
import sqlite3

from google.protobuf.message import Message

from qlorad.v1 import errors_pb2
from services.common.errors import Fault

MIGRATION = """
CREATE TABLE requests (
  method TEXT NOT NULL,
  request_id TEXT NOT NULL,
  body BLOB NOT NULL,
  answer BLOB NOT NULL,
  made REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
  PRIMARY KEY (method, request_id)
) WITHOUT ROWID
"""


def body_of(request: Message) -> bytes:
    """The request's fingerprint."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def recall(db: sqlite3.Connection, method: str, request_id: str, body: bytes) -> bytes | None:
    """The noted answer; None if the id is new; REQUEST_ID_REUSED if the body differs."""
    row = db.execute(
        "SELECT body, answer FROM requests WHERE method = ? AND request_id = ?", (method, request_id)
    ).fetchone()
    if row is None:
        return None
    if row["body"] != body:
        raise Fault(
            errors_pb2.REASON_REQUEST_ID_REUSED,
            f"request_id {request_id!r} was used before for another {method}; accepted: a new id, or the same request",
            resource=f"requests/{request_id}",
        )
    answer: bytes = row["answer"]
    return answer


def note(db: sqlite3.Connection, method: str, request_id: str, body: bytes, answer: bytes) -> None:
    """Notes the answer."""
    db.execute(
        "INSERT INTO requests (method, request_id, body, answer) VALUES (?, ?, ?, ?)",
        (method, request_id, body, answer),
    )


def prune(db: sqlite3.Connection, older_than_seconds: float = 30 * 86400.0) -> None:
    """Forgets answers older than a month."""
    db.execute("DELETE FROM requests WHERE made < (julianday('now') - 2440587.5) * 86400.0 - ?", (older_than_seconds,))
