"""From the names of a request to what answers it.

Law of this room: a name is resolved once, when the request arrives; what it
meant then answers the whole request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from qlorad.v1 import inference_pb2
from services.common import facts, generation, names
from services.common.errors import corrupt
from services.common.shelf import Shelf
from services.inference.adapters import check_model, no_model
from services.inference.engine import Engine
from services.inference.messages import BASE, Ask
from services.inference.residency import Residency


@dataclass(frozen=True, slots=True)
class Held:
    """What answers a request; stays as long as it is held."""

    engine: Engine
    model: inference_pb2.LoadedModel
    adapter_digest: str
    """Empty = the base alone."""
    defaults: generation.Options
    """How the adapter was sealed to choose; nothing for a base."""


class Reach:
    """Finds and holds what answers."""

    def __init__(self, shelf: Shelf, residency: Residency) -> None:
        self._shelf = shelf
        self._residency = residency
        self._defaults: dict[str, generation.Options] = {"": generation.Options()}

    def context_tokens(self) -> int:
        """The context of what is, or would be, resident; 0 = nothing is wanted."""
        wanted = self._residency.wanted
        return wanted.model.context_tokens if wanted is not None else 0

    @contextlib.asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[Held]:
        """What answers a request: NOT_FOUND, or whatever hinders it."""
        try:
            model = await self._digest("model", ask.model)
            adapter = "" if ask.adapter == BASE else await self._digest("adapter", ask.adapter)
            while True:
                engine, table = await self._residency.ready()
                # Nothing is awaited from here to the caller: an unload comes before the look at the table, or after.
                check_model(table.model, ask.model, model)
                digest = table.who_answers(ask.adapter, adapter)
                if digest in self._defaults:
                    break
                self._defaults[digest] = await asyncio.to_thread(self._sealed_defaults, digest)
            if table.model is None:
                raise no_model(ask.model)
            yield Held(engine, table.model, digest, self._defaults[digest])
        finally:
            self._residency.touch()

    async def _digest(self, field: str, name: str) -> str:
        """What a name of a request is now; empty for an empty one."""
        if not name:
            return ""
        ident = names.parse(field, name, field + "s")
        return await asyncio.to_thread(self._shelf.resolve, field + "s", ident, field)

    def _sealed_defaults(self, digest: str) -> generation.Options:
        sealed = self._shelf.open("adapters", digest)
        told = facts.from_manifest(facts.AdapterFacts, sealed.manifest).generation
        return generation.from_plain(told, lambda why: corrupt(f"adapters/{digest}", why))
