"""Load, unload, switch: the calls that change what is resident.

Law of this room: each to its end even if the caller leaves. The answer is noted
with what is then wanted, in one transaction. A request_id that was answered is
answered alike; only a load whose thing is no longer in memory is done again, since
its old answer would be untrue.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from qlorad.v1 import inference_pb2
from services.common import idempotency, names
from services.common.errors import Violation, invalid
from services.common.store import Store
from services.inference.messages import check_switch
from services.inference.residency import Residency

A = TypeVar("A", bound=Message)
Asked = (
    inference_pb2.LoadModelRequest
    | inference_pb2.UnloadModelRequest
    | inference_pb2.LoadAdapterRequest
    | inference_pb2.UnloadAdapterRequest
    | inference_pb2.SwitchAdapterRequest
)

log = logging.getLogger("qlorad.inference")


class Changes:
    """The mutating calls of InferenceService."""

    def __init__(self, store: Store, residency: Residency) -> None:
        self._store = store
        self._residency = residency
        self._running: set[asyncio.Task[Any]] = set()
        self._by_id: dict[tuple[str, str], asyncio.Task[Any]] = {}

    async def load_model(self, request: inference_pb2.LoadModelRequest) -> inference_pb2.LoadModelResponse:
        """Brings a model into memory."""
        wrong = names.check_name("model", request.model, "models")
        if request.precision not in inference_pb2.Precision.values():
            known = ", ".join(inference_pb2.Precision.keys())
            wrong.append(Violation("precision", str(request.precision), known))
        self._check(request, wrong)

        async def act() -> inference_pb2.LoadModelResponse:
            model = await self._residency.load_model(request.model, request.precision, request.pin)
            return inference_pb2.LoadModelResponse(model=model)

        def still(answer: inference_pb2.LoadModelResponse) -> bool:
            return answer.model.digest in self._residency.bases.awake

        return await self._once("LoadModel", request, inference_pb2.LoadModelResponse, act, still)

    async def unload_model(self, request: inference_pb2.UnloadModelRequest) -> inference_pb2.UnloadModelResponse:
        """Frees a model and its adapters; the device goes with the last one."""
        self._check(request, names.check_name("model", request.model, "models") if request.model else [])

        async def act() -> inference_pb2.UnloadModelResponse:
            freed = await self._residency.unload_model(request.model)
            return inference_pb2.UnloadModelResponse(freed_bytes=freed)

        return await self._once("UnloadModel", request, inference_pb2.UnloadModelResponse, act)

    async def load_adapter(self, request: inference_pb2.LoadAdapterRequest) -> inference_pb2.LoadAdapterResponse:
        """Brings an adapter into memory and proves it."""
        self._check(request, names.check_name("adapter", request.adapter, "adapters"))

        async def act() -> inference_pb2.LoadAdapterResponse:
            adapter = await self._residency.load_adapter(request.adapter, request.pin)
            return inference_pb2.LoadAdapterResponse(adapter=adapter)

        def still(answer: inference_pb2.LoadAdapterResponse) -> bool:
            entry = self._residency.roster.table.get(answer.adapter.digest)
            return entry is not None and entry.is_in_memory

        return await self._once("LoadAdapter", request, inference_pb2.LoadAdapterResponse, act, still)

    async def unload_adapter(self, request: inference_pb2.UnloadAdapterRequest) -> inference_pb2.UnloadAdapterResponse:
        """Frees an adapter; if it was the default, the base is now."""
        self._check(request, names.check_name("adapter", request.adapter, "adapters"))

        async def act() -> inference_pb2.UnloadAdapterResponse:
            freed = await self._residency.unload_adapter(request.adapter)
            return inference_pb2.UnloadAdapterResponse(freed_bytes=freed)

        return await self._once("UnloadAdapter", request, inference_pb2.UnloadAdapterResponse, act)

    async def switch_adapter(self, request: inference_pb2.SwitchAdapterRequest) -> inference_pb2.SwitchAdapterResponse:
        """Sets who answers where a request names nobody."""
        self._check(request, check_switch(request.adapter))
        return await self._once(
            "SwitchAdapter",
            request,
            inference_pb2.SwitchAdapterResponse,
            lambda: self._residency.switch(request.adapter),
        )

    async def settle(self) -> None:
        """Waits for changes whose callers left."""
        if self._running:
            await asyncio.wait(self._running)

    @staticmethod
    def _check(request: Asked, wrong: list[Violation]) -> None:
        if request.request_id:
            wrong = [*wrong, *names.check_request_id(request.request_id)]
        if wrong:
            raise invalid(wrong)

    async def _once(
        self,
        method: str,
        request: Asked,
        kind: type[A],
        act: Callable[[], Awaitable[A]],
        still: Callable[[A], bool] = lambda answer: True,
    ) -> A:
        """Runs a change to its end, whatever becomes of the caller, and notes its answer; one at a time for an id."""
        key = (method, request.request_id)
        while request.request_id and (before := self._by_id.get(key)) is not None:
            await asyncio.wait([before])
        task = asyncio.create_task(self._run(method, request, kind, act, still), name=method)
        self._running.add(task)
        if request.request_id:
            self._by_id[key] = task
        task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    def _forget(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._by_id.pop(key, None)
        if not task.cancelled() and task.exception() is not None:
            log.info("%s: %s", task.get_name(), task.exception())

    async def _run(
        self, method: str, request: Asked, kind: type[A], act: Callable[[], Awaitable[A]], still: Callable[[A], bool]
    ) -> A:
        ident, body = request.request_id, idempotency.body_of(request)
        noted: bytes | None = None
        if ident:
            noted = await self._store.run(lambda db: idempotency.recall(db, method, ident, body))
        if noted is not None and still(kind.FromString(noted)):
            return kind.FromString(noted)
        answer = await act()

        def note(db: sqlite3.Connection) -> None:
            if ident and noted is None:
                idempotency.note(db, method, ident, body, answer.SerializeToString())

        await self._residency.memory.save(note)
        return answer
