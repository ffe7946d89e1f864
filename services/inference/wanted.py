"""What should be resident: remembered, so that it comes back.

Law of this room: written after each change that succeeded, in the transaction
that notes the answer. Says what is wanted, not what is in memory: an engine that
died, slept or ended with the daemon is brought back from here.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from qlorad.v1 import inference_pb2

MIGRATION = """
CREATE TABLE wanted_model (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  loaded BLOB NOT NULL,
  default_digest TEXT NOT NULL
);
CREATE TABLE wanted_adapters (
  digest TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  place INTEGER NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A base and its adapters as they should be."""

    model: inference_pb2.LoadedModel
    """As it was told when it was last loaded; its precision is the resolved one."""
    adapters: tuple[tuple[str, str], ...] = ()
    """Pairs of digest and the name it was loaded by, oldest first."""
    default: str = ""
    """Digest; empty = the base."""

    def digests(self) -> list[str]:
        return [digest for digest, _ in self.adapters]

    def digest_by_name(self, name: str) -> str:
        """The digest of the adapter that was loaded by this name; empty if none was."""
        return next((d for d, n in self.adapters if n == name), "")

    def without(self, digest: str) -> Wanted:
        """After unloading an adapter; if it was the default, the base is now."""
        kept = tuple(pair for pair in self.adapters if pair[0] != digest)
        return Wanted(self.model, kept, "" if self.default == digest else self.default)


def read(db: sqlite3.Connection) -> Wanted | None:
    """What is wanted; None = nothing."""
    row = db.execute("SELECT loaded, default_digest FROM wanted_model").fetchone()
    if row is None:
        return None
    adapters = db.execute("SELECT digest, name FROM wanted_adapters ORDER BY place").fetchall()
    model = inference_pb2.LoadedModel.FromString(row["loaded"])
    return Wanted(model, tuple((a["digest"], a["name"]) for a in adapters), row["default_digest"])


def write(db: sqlite3.Connection, wanted: Wanted | None) -> None:
    """Takes the place of what was wanted."""
    db.execute("DELETE FROM wanted_model")
    db.execute("DELETE FROM wanted_adapters")
    if wanted is None:
        return
    db.execute(
        "INSERT INTO wanted_model (one, loaded, default_digest) VALUES (1, ?, ?)",
        (wanted.model.SerializeToString(), wanted.default),
    )
    db.executemany(
        "INSERT INTO wanted_adapters (digest, name, place) VALUES (?, ?, ?)",
        [(digest, name, place) for place, (digest, name) in enumerate(wanted.adapters)],
    )
