"""Presets that are shipped, and those that callers keep.

Law of this room: what was answered is on disk, and a copy in memory is what
requests read. A request_id that was answered is answered alike.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from qlorad.v1 import inference_pb2
from services.common import idempotency, names
from services.common.errors import Violation, already_exists, in_use, invalid, not_found
from services.common.store import Store
from services.inference import preset

A = TypeVar("A", bound=Message)

MIGRATION = """
CREATE TABLE presets (
  name TEXT PRIMARY KEY,
  preset BLOB NOT NULL
) WITHOUT ROWID
"""
MAX_PRESETS = 1000
DEFAULT_PAGE, MAX_PAGE = 50, 500


class PresetBook:
    """Every preset by its full name."""

    def __init__(self, store: Store, shipped: Mapping[str, inference_pb2.Preset]) -> None:
        self._store = store
        self._shipped = dict(shipped)
        self.all: dict[str, inference_pb2.Preset] = dict(shipped)
        """Every preset by name; a new mapping takes its place with each change."""
        self._writing = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        """Reads what callers kept. A name that is shipped by now is hidden by the shipped one."""
        self._become(await self._store.run(_read))

    async def create(self, request: inference_pb2.CreatePresetRequest) -> inference_pb2.CreatePresetResponse:
        """Keeps a preset."""
        wrong = names.check_request_id(request.request_id) if request.request_id else []
        wrong += preset.check(request.preset)
        if wrong:
            raise invalid(wrong)
        made = inference_pb2.CreatePresetResponse(preset=request.preset)

        def write(db: sqlite3.Connection) -> inference_pb2.CreatePresetResponse:
            if made.preset.name in self._shipped or made.preset.name in _read(db):
                raise already_exists(made.preset.name, "choose another name, or delete it first")
            count = int(db.execute("SELECT count(*) FROM presets").fetchone()[0])
            if count >= MAX_PRESETS:
                raise invalid([Violation("preset", f"one more than {count}", f"at most {MAX_PRESETS}; delete one")])
            body = made.preset.SerializeToString(deterministic=True)
            db.execute("INSERT INTO presets (name, preset) VALUES (?, ?)", (made.preset.name, body))
            return made

        return await self._once("CreatePreset", request, inference_pb2.CreatePresetResponse, write)

    async def delete(self, request: inference_pb2.DeletePresetRequest) -> inference_pb2.DeletePresetResponse:
        """Forgets a preset of one's own."""
        wrong = names.check_request_id(request.request_id) if request.request_id else []
        wrong += names.check_name("name", request.name, "presets")
        if wrong:
            raise invalid(wrong)

        def write(db: sqlite3.Connection) -> inference_pb2.DeletePresetResponse:
            if request.name in self._shipped:
                raise in_use(request.name, ["qlorad itself, which ships it"])
            if not db.execute("DELETE FROM presets WHERE name = ?", (request.name,)).rowcount:
                raise not_found(request.name, self.all)
            return inference_pb2.DeletePresetResponse()

        return await self._once("DeletePreset", request, inference_pb2.DeletePresetResponse, write)

    def list(self, request: inference_pb2.ListPresetsRequest) -> inference_pb2.ListPresetsResponse:
        """A page of presets."""
        if request.page_size > MAX_PAGE:
            told = f"0 (= {DEFAULT_PAGE}) to {MAX_PAGE}"
            raise invalid([Violation("page_size", str(request.page_size), told)])
        position = names.page_position(request.page_token)
        page, following = preset.listed(self.all, position, request.page_size or DEFAULT_PAGE)
        return inference_pb2.ListPresetsResponse(presets=page, next_page_token=names.page_token(following))

    async def _once(
        self,
        method: str,
        request: inference_pb2.CreatePresetRequest | inference_pb2.DeletePresetRequest,
        kind: type[A],
        write: Callable[[sqlite3.Connection], A],
    ) -> A:
        """The noted answer, or the effect and its note in one transaction."""
        ident, body = request.request_id, idempotency.body_of(request)

        def work(db: sqlite3.Connection) -> tuple[A, dict[str, inference_pb2.Preset]]:
            noted = idempotency.recall(db, method, ident, body) if ident else None
            answer = kind.FromString(noted) if noted is not None else write(db)
            if ident and noted is None:
                idempotency.note(db, method, ident, body, answer.SerializeToString())
            return answer, _read(db)

        async def act() -> A:
            async with self._writing:
                answer, own = await self._store.run(work)
                self._become(own)
            return answer

        # To its end even if the caller leaves: else the copy in memory would lack what is on disk.
        task = asyncio.create_task(act(), name=method)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    def _become(self, own: Mapping[str, inference_pb2.Preset]) -> None:
        self.all = {**own, **self._shipped}

    async def settle(self) -> None:
        """Waits for changes whose callers left."""
        if self._running:
            await asyncio.wait(self._running)


def _read(db: sqlite3.Connection) -> dict[str, inference_pb2.Preset]:
    rows = db.execute("SELECT name, preset FROM presets").fetchall()
    return {row["name"]: inference_pb2.Preset.FromString(row["preset"]) for row in rows}
