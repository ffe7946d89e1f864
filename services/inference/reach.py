"""From the names of a request to what answers it.

Law of this room: a name is resolved once, when the request arrives; what it
meant then answers the whole request, and is held for as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from qlorad.v1 import artifacts_pb2, inference_pb2
from services.common import facts, generation
from services.common.errors import corrupt
from services.inference.engine import Engine
from services.inference.messages import Ask
from services.inference.residency import Residency


@dataclass(frozen=True, slots=True)
class Held:
    """What answers a request; stays as long as it is held."""

    engine: Engine
    model_digest: str
    precision: inference_pb2.Precision.ValueType
    context_tokens: int
    adapter_digest: str
    """Empty = the base alone."""
    defaults: generation.Options
    """How the adapter was sealed to choose; nothing for a base."""


class Reach:
    """Finds and holds what answers."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def context_tokens(self) -> int:
        """The longest context of what is, or would be, resident; 0 = nothing is wanted."""
        return max((base.context_tokens for base in self._residency.memory.now.bases), default=0)

    @contextlib.asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[Held]:
        """What answers a request: NOT_FOUND, or whatever hinders it."""
        hold = await self._residency.who(ask.model, ask.adapter)
        try:
            defaults = sealed_defaults(hold.manifest) if hold.manifest is not None else generation.Options()
            yield Held(
                hold.engine,
                hold.model_digest,
                hold.engine.loaded.precision,
                hold.context_tokens,
                hold.adapter_digest,
                defaults,
            )
        finally:
            hold.release()


def sealed_defaults(manifest: artifacts_pb2.Manifest) -> generation.Options:
    """How an adapter was sealed to choose tokens; DATA_LOSS if its manifest says something else."""
    told = facts.from_manifest(facts.AdapterFacts, manifest).generation
    return generation.from_plain(told, lambda why: corrupt(f"adapters/{manifest.digest}", why))
