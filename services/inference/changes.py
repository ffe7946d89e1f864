"""Load, unload, switch: the calls that change what is resident.

Law of this room: one at a time, each to its end even if the caller leaves. The
answer is noted with what is then wanted, in one transaction. A request_id that
was answered is answered alike; only a load whose thing is no longer in memory is
done again, since its old answer would be untrue.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from qlorad.v1 import errors_pb2, inference_pb2
from services.common import idempotency, names
from services.common.errors import Fault, Violation, invalid
from services.common.shelf import Shelf
from services.common.store import Store
from services.inference import wanted
from services.inference.adapters import Table, check_reload, no_model, not_loaded
from services.inference.messages import BASE, check_switch
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

    def __init__(self, shelf: Shelf, store: Store, residency: Residency) -> None:
        self._shelf = shelf
        self._store = store
        self._residency = residency
        self._running: set[asyncio.Task[Any]] = set()

    async def load_model(self, request: inference_pb2.LoadModelRequest) -> inference_pb2.LoadModelResponse:
        """Brings a model into memory."""
        wrong = names.check_name("model", request.model, "models")
        if request.precision not in inference_pb2.Precision.values():
            known = ", ".join(inference_pb2.Precision.keys())
            wrong.append(Violation("precision", str(request.precision), known))
        self._check(request, wrong)

        async def act() -> inference_pb2.LoadModelResponse:
            r = self._residency
            ident = names.parse("model", request.model, "models")
            digest = await asyncio.to_thread(self._shelf.resolve, "models", ident, "model")
            if r.table.model is not None:
                check_reload(r.table.model, request.model, digest, request.precision)
                return inference_pb2.LoadModelResponse(model=r.table.model)
            sealed = await asyncio.to_thread(self._shelf.open, "models", digest, True, "model")
            # Asking for what sleeps brings its adapters back too.
            if r.wanted is not None and r.wanted.model.digest == digest:
                if request.precision in (inference_pb2.PRECISION_UNSPECIFIED, r.wanted.model.precision):
                    await r.wake_locked()
                    return inference_pb2.LoadModelResponse(model=r.table.model)
            return inference_pb2.LoadModelResponse(model=await r.bring_locked(request.model, sealed, request.precision))

        def still(answer: inference_pb2.LoadModelResponse) -> bool:
            model = self._residency.table.model
            return model is not None and model.digest == answer.model.digest

        return await self._once("LoadModel", request, inference_pb2.LoadModelResponse, act, still)

    async def unload_model(self, request: inference_pb2.UnloadModelRequest) -> inference_pb2.UnloadModelResponse:
        """Frees the model, its adapters and the device."""
        self._check(request, names.check_name("model", request.model, "models") if request.model else [])

        async def act() -> inference_pb2.UnloadModelResponse:
            r = self._residency
            now = r.wanted_now()
            if now is None:
                raise no_model(request.model)
            if request.model:
                ident = names.parse("model", request.model, "models")
                if request.model != now.model.model:
                    digest = await asyncio.to_thread(self._shelf.resolve, "models", ident, "model")
                    if digest != now.model.digest:
                        raise no_model(request.model)
            freed = await r.drop_model_locked()
            r.wanted = None
            return inference_pb2.UnloadModelResponse(freed_bytes=freed)

        return await self._once("UnloadModel", request, inference_pb2.UnloadModelResponse, act)

    async def load_adapter(self, request: inference_pb2.LoadAdapterRequest) -> inference_pb2.LoadAdapterResponse:
        """Brings an adapter into memory and proves it."""
        self._check(request, names.check_name("adapter", request.adapter, "adapters"))

        async def act() -> inference_pb2.LoadAdapterResponse:
            r = self._residency
            digest = await self._digest(request.adapter)
            await self._need_model(request.adapter)
            loaded = r.table.adapter(digest) or await r.add_adapter_locked(request.adapter, digest)
            return inference_pb2.LoadAdapterResponse(adapter=_listed(r.table, loaded.digest))

        def still(answer: inference_pb2.LoadAdapterResponse) -> bool:
            return self._residency.table.adapter(answer.adapter.digest) is not None

        return await self._once("LoadAdapter", request, inference_pb2.LoadAdapterResponse, act, still)

    async def unload_adapter(self, request: inference_pb2.UnloadAdapterRequest) -> inference_pb2.UnloadAdapterResponse:
        """Frees an adapter; if it was the default, the base is now."""
        self._check(request, names.check_name("adapter", request.adapter, "adapters"))

        async def act() -> inference_pb2.UnloadAdapterResponse:
            r = self._residency
            asleep = r.wanted if r.engine is None else None
            by_name = asleep.digest_by_name(request.adapter) if asleep else r.table.digest_by_name(request.adapter)
            digest = by_name or await self._digest(request.adapter)
            if asleep is not None and digest in asleep.digests():
                r.wanted = asleep.without(digest)
                return inference_pb2.UnloadAdapterResponse(freed_bytes=0)
            if r.table.adapter(digest) is None:
                raise not_loaded(request.adapter, r.table.names())
            return inference_pb2.UnloadAdapterResponse(freed_bytes=await r.drop_adapter_locked(digest))

        return await self._once("UnloadAdapter", request, inference_pb2.UnloadAdapterResponse, act)

    async def switch_adapter(self, request: inference_pb2.SwitchAdapterRequest) -> inference_pb2.SwitchAdapterResponse:
        """Sets who answers where a request names nobody."""
        self._check(request, check_switch(request.adapter))

        async def act() -> inference_pb2.SwitchAdapterResponse:
            r = self._residency
            await r.wake_locked()
            digest = "" if request.adapter == BASE else await self._digest(request.adapter)
            if digest and r.table.adapter(digest) is None:
                raise not_loaded(request.adapter, r.table.names())
            before = r.table.default
            r.table = r.table.switched(digest)
            return inference_pb2.SwitchAdapterResponse(digest=digest, previous_digest=before)

        return await self._once("SwitchAdapter", request, inference_pb2.SwitchAdapterResponse, act)

    async def settle(self) -> None:
        """Waits for changes whose callers left."""
        if self._running:
            await asyncio.wait(self._running)

    async def _need_model(self, adapter: str) -> None:
        """Wakes the base; WRONG_STATE for an adapter whose base is not there."""
        try:
            await self._residency.wake_locked()
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND or self._residency.wanted is not None:
                raise
            raise Fault(
                errors_pb2.REASON_WRONG_STATE,
                f"{adapter!r} needs its base in memory; no model is loaded; accepted: load the base first",
                resource=adapter,
                blockers=(("models", "no model is loaded"),),
            ) from None

    async def _digest(self, adapter: str) -> str:
        ident = names.parse("adapter", adapter, "adapters")
        return await asyncio.to_thread(self._shelf.resolve, "adapters", ident, "adapter")

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
        """Runs a change to its end, whatever becomes of the caller, and notes its answer."""
        task = asyncio.create_task(self._run(method, request, kind, act, still), name=method)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.info("%s: %s", task.get_name(), task.exception())

    async def _run(
        self, method: str, request: Asked, kind: type[A], act: Callable[[], Awaitable[A]], still: Callable[[A], bool]
    ) -> A:
        r, ident, body = self._residency, request.request_id, idempotency.body_of(request)
        async with r.changing:
            noted: bytes | None = None
            if ident:
                noted = await self._store.run(lambda db: idempotency.recall(db, method, ident, body))
            if noted is not None and still(kind.FromString(noted)):
                return kind.FromString(noted)
            answer = await act()
            r.wanted = r.wanted_now()
            r.touch()

            def write(db: sqlite3.Connection) -> None:
                wanted.write(db, r.wanted)
                if ident and noted is None:
                    idempotency.note(db, method, ident, body, answer.SerializeToString())

            await self._store.run(write)
            return answer


def _listed(table: Table, digest: str) -> inference_pb2.LoadedAdapter:
    return next(a for a in table.listed() if a.digest == digest)
