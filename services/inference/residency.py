"""What is resident, seen from the door: who answers a request, and for how long it is held.

Law of this room: names are resolved when a request arrives, and never later; what
answers is held until the request lets go. Puts bases, adapters and what is wanted
together; each of them decides for itself.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2
from services.common import names
from services.common.errors import Fault, wrong_state
from services.common.server import Health
from services.common.shelf import Shelf
from services.inference.adapters import Table
from services.inference.bases import Bases, Comers, now
from services.inference.choosing import check_precision, choose_base, no_model, not_loaded, only_one
from services.inference.engine import Engine
from services.inference.leases import SharedLease
from services.inference.life import Awake
from services.inference.messages import BASE
from services.inference.metrics import Metrics
from services.inference.pins import Pins
from services.inference.roster import Roster
from services.inference.starting import Place
from services.inference.wanted import Default, Memory
from services.inference.watching import Watching

log = logging.getLogger("qlorad.inference")

_MANIFESTS = 128
"""Manifests of adapters that are kept at hand."""


@dataclass(slots=True)
class Hold:
    """What answers one request, kept in memory until `release`."""

    engine: Engine
    model_digest: str
    adapter_digest: str
    """Empty = the base alone."""
    context_tokens: int
    manifest: artifacts_pb2.Manifest | None
    """Of the adapter."""
    let_go: list[Callable[[], None]] = field(default_factory=list)

    def release(self) -> None:
        """Lets go; once is enough, more does nothing."""
        while self.let_go:
            self.let_go.pop()()


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request's names as digests."""

    model_digest: str
    adapter_name: str
    adapter_digest: str
    manifest: artifacts_pb2.Manifest | None

    @property
    def adapter_base(self) -> str:
        return self.manifest.lineage.base_digest if self.manifest is not None else ""


class Residency:
    """Bases and adapters of one daemon."""

    def __init__(
        self, shelf: Shelf, place: Place, lease: SharedLease, memory: Memory, adapter_bytes: int, metrics: Metrics
    ) -> None:
        self._shelf = shelf
        self.memory = memory
        self._pins = Pins(shelf)
        self.watching = Watching()
        self._manifest = functools.lru_cache(_MANIFESTS)(lambda digest: shelf.open("adapters", digest).manifest)
        self.roster = Roster(
            shelf, adapter_bytes, self._pins, memory, metrics, lambda d: self.bases.awake.get(d), self._changed, now
        )
        comers = Comers(self.roster.restore, self.roster.lost, self.roster.on_device)
        self.bases = Bases(shelf, place, lease, self._pins, memory, metrics, comers)

    async def begin(self, health: Health) -> None:
        """Takes up what the last daemon left; loads nothing yet."""
        await self.memory.begin()
        self.bases.begin(health)

    async def end(self) -> None:
        """Ends the engines with the daemon; what is wanted stays noted."""
        await self.roster.end()
        await self.bases.end()
        await self._pins.settle()
        await self.memory.end()

    # for requests

    async def who(self, model: str, adapter: str) -> Hold:
        """Who answers a request that says these names; in memory, proven, and held.

        `adapter` is "" for the default, "base" for none. Waits while something is
        loaded.
        """
        asked, awake = await self._base_for(model, adapter, on_demand=True)
        let_go: list[Callable[[], None]] = [lambda: awake.release(now(), used=True)]
        if asked.adapter_digest:
            try:
                await self.roster.hold(asked.adapter_digest, asked.adapter_name, awake)
            except BaseException:
                awake.release(now())
                raise
            let_go.append(lambda: self.roster.release(asked.adapter_digest, awake))
        return Hold(
            awake.engine, awake.digest, asked.adapter_digest, awake.model.context_tokens, asked.manifest, let_go
        )

    async def _base_for(self, model: str, adapter: str, on_demand: bool) -> tuple[_Asked, Awake]:
        """What a request's names are now, and the base that answers, held."""
        name = "" if adapter == BASE else adapter or self.memory.now.default.name
        try:
            asked = await asyncio.to_thread(self._look, model, name)
            if name and not adapter and name == self.memory.now.default.name:
                self._default_is(Default(name, asked.adapter_digest, asked.adapter_base))
            wanted = self.memory.now
            base = choose_base(
                asked.model_digest, model, name, asked.adapter_base, wanted.default.base_digest, wanted.named_bases()
            )
        except Fault as fault:
            if name and not adapter and fault.resource == name:
                fault.message += " (it is the default that SwitchAdapter set; 'base' names none)"
            raise
        called = await self._base_name(base, model, asked, on_demand)
        return asked, await self.bases.hold(base, called, on_demand and bool(asked.adapter_digest))

    def _look(self, model: str, adapter: str) -> _Asked:
        """Blocking."""
        model_digest = self.resolve("model", model) if model else ""
        if not adapter:
            return _Asked(model_digest, "", "", None)
        digest = self.resolve("adapter", adapter)
        return _Asked(model_digest, adapter, digest, self._manifest(digest))

    def resolve(self, field: str, name: str) -> str:
        """What a name is now. Blocking."""
        return self._shelf.resolve(field + "s", names.parse(field, name, field + "s"), field)

    async def _base_name(self, digest: str, model: str, asked: _Asked, on_demand: bool) -> str:
        """How a base is called; REJECTED if it is an adapter's and not in the store, WRONG_STATE if it may not come."""
        wanted = self.memory.now.base(digest)
        if wanted is not None:
            return wanted.model
        if model:
            return model
        try:
            name = await asyncio.to_thread(self._name_of, digest)
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND:
                raise
            why = f"check 'base': it was trained on {digest or 'a base it does not name'}, which is not in the store"
            raise self.roster.refuse(asked.adapter_digest, asked.adapter_name, digest, why) from None
        if not on_demand:
            raise wrong_state(asked.adapter_name, f"without its base {name}, which is not loaded", ["its base loaded"])
        return name

    def _name_of(self, digest: str) -> str:
        """An alias of a base, or its digest; NOT_FOUND if it is not in the store. Blocking."""
        self._shelf.open("models", digest)
        aliases = [a.name for a in self._shelf.aliases("models") if a.digest == digest]
        return aliases[0] if aliases else f"models/{digest}"

    # changes

    async def load_model(
        self, name: str, precision: inference_pb2.Precision.ValueType, pin: bool
    ) -> inference_pb2.LoadedModel:
        """Brings a base in with the adapters that are wanted beside it."""
        digest = await asyncio.to_thread(self.resolve, "model", name)
        awake = await self.bases.bring(digest, name, precision, pin)
        check_precision(awake.model, precision)
        if awake.restoring is not None:
            await asyncio.wait([awake.restoring])
        awake.check()
        if pin and not awake.model.pinned:
            awake.model.pinned = True
            self.memory.become(self.memory.now.with_base(awake.told(0)))
        awake.touched = now().tick
        return awake.told(self.bases.waits[digest])

    async def unload_model(self, name: str) -> int:
        """Frees a base and its adapters; empty = the only one. Bytes given back."""
        wanted = self.memory.now
        digest = await self._known("model", name, wanted.named_bases()) if name else only_one(wanted.named_bases())
        if wanted.base(digest) is None:
            raise no_model(name, [n for _, n in wanted.named_bases()])
        freed = await self.bases.unload(digest)
        before = self.memory.now.default
        self.memory.become(self.memory.now.without_base(digest))
        self._default_was(before)
        return freed

    async def load_adapter(self, name: str, pin: bool) -> inference_pb2.LoadedAdapter:
        """Brings an adapter into memory and proves it."""
        asked, awake = await self._base_for("", name, on_demand=False)
        try:
            entry = await self.roster.prove(asked.adapter_digest, name, awake, pin)
        finally:
            awake.release(now())
        return entry.told(entry.digest == self.memory.now.default.digest)

    async def unload_adapter(self, name: str) -> int:
        """Frees an adapter; if it was the default, the base is now. Bytes freed."""
        known = [(e.digest, e.name) for e in self.roster.table.entries.values() if e.is_in_memory]
        known += [(a.digest, a.name) for a in self.memory.now.adapters]
        digest = await self._known("adapter", name, known)
        wanted = self.memory.now.adapter(digest)
        awake = self.bases.awake.get(wanted.base_digest) if wanted is not None else None
        if awake is not None and awake.restoring is not None:
            await asyncio.wait([awake.restoring])
        asleep = wanted is not None and awake is None
        freed = 0 if asleep else await self.roster.unload(digest, name)
        before = self.memory.now.default
        self.memory.become(self.memory.now.without_adapter(digest))
        self._default_was(before)
        return freed

    async def switch(self, name: str) -> inference_pb2.SwitchAdapterResponse:
        """Sets the name that answers where a request says none; digests as they are now."""
        before = self.memory.now.default
        asked = await asyncio.to_thread(self._look, "", "" if name == BASE else name)
        if before.name:
            before = await self._default_now()
        if asked.adapter_digest and self.memory.now.adapter(asked.adapter_digest) is None:
            raise not_loaded(name, [a.name for a in self.memory.now.adapters])
        self._default_is(Default(asked.adapter_name, asked.adapter_digest, asked.adapter_base))
        return inference_pb2.SwitchAdapterResponse(digest=asked.adapter_digest, previous_digest=before.digest)

    async def _known(self, field: str, name: str, known: list[tuple[str, str]]) -> str:
        """What a name is now if that is known here; else the newest known one that was asked for by this name."""
        by_name = [digest for digest, asked in known if asked == name]
        try:
            digest = await asyncio.to_thread(self.resolve, field, name)
        except Fault:
            if not by_name:
                raise
            return by_name[-1]
        return digest if digest in [d for d, _ in known] or not by_name else by_name[-1]

    # what is told

    def models(self) -> list[inference_pb2.LoadedModel]:
        """Bases in memory."""
        return [a.told(self.bases.waits[a.digest]) for a in self.bases.awake.values()]

    async def adapters(self) -> list[inference_pb2.LoadedAdapter]:
        """Adapters in memory, on their way, or refused."""
        await self._default_now()
        return self.roster.table.listed(self.memory.now.default.digest)

    async def _default_now(self) -> Default:
        """The default, looked up; what it was, if its name is gone."""
        default = self.memory.now.default
        if default.name:
            try:
                asked = await asyncio.to_thread(self._look, "", default.name)
            except Fault as fault:
                log.warning("the default cannot be looked up: %s", fault)
                return default
            if self.memory.now.default.name == default.name:
                self._default_is(Default(default.name, asked.adapter_digest, asked.adapter_base))
        return self.memory.now.default

    def _default_is(self, default: Default) -> None:
        before = self.memory.now.default
        if before != default:
            self.memory.become(self.memory.now.switched(default))
            self._default_was(before)

    def _default_was(self, before: Default) -> None:
        table = self.roster.table
        self.watching.changed(table, table, before.digest, self.memory.now.default.digest)

    def _changed(self, before: Table, after: Table) -> None:
        default = self.memory.now.default.digest
        self.watching.changed(before, after, default, default)
