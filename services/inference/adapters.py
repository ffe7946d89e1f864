"""Adapters and where each is: the table that requests, budgets and watchers read.

Law of this room: pure. A table is never changed, a new one takes its place. An
adapter moves only along `LAW`; one that a request waits for or uses never leaves
by itself; bytes are counted from the moment that room was made for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from qlorad.v1 import inference_pb2
from services.inference.budget import Item

State: TypeAlias = inference_pb2.AdapterState.ValueType

ABSENT = inference_pb2.ADAPTER_STATE_ABSENT
FETCHING = inference_pb2.ADAPTER_STATE_FETCHING
VERIFYING = inference_pb2.ADAPTER_STATE_VERIFYING
HOST = inference_pb2.ADAPTER_STATE_HOST
DEVICE = inference_pb2.ADAPTER_STATE_DEVICE
DRAINING = inference_pb2.ADAPTER_STATE_DRAINING
REJECTED = inference_pb2.ADAPTER_STATE_REJECTED

LAW: Mapping[State, frozenset[State]] = MappingProxyType({
    ABSENT: frozenset({FETCHING}),
    FETCHING: frozenset({VERIFYING, REJECTED, ABSENT}),
    VERIFYING: frozenset({HOST, REJECTED, ABSENT}),
    HOST: frozenset({DEVICE, DRAINING, ABSENT}),
    DEVICE: frozenset({HOST, DRAINING, ABSENT}),
    DRAINING: frozenset({ABSENT}),
    REJECTED: frozenset({FETCHING, ABSENT}),
})  # fmt: skip
LOADING = frozenset({FETCHING, VERIFYING})
IN_MEMORY = frozenset({HOST, DEVICE})
REJECTED_KEPT = 64
"""Refused adapters that stay listed."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, on both clocks: the one that only goes forward decides, the other is told."""

    tick: float
    wall: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter. `waits` and `holds` are requests that wait for it and that use it."""

    digest: str
    name: str
    """As it was last asked for."""
    base_digest: str
    state: State = ABSENT
    reason: str = ""
    rank: int = 0
    memory_bytes: int = 0
    load_seconds: float = 0.0
    probe_effect: float = 0.0
    loaded_at: float = 0.0
    pinned: bool = False
    waits: int = 0
    holds: int = 0
    used_tick: float = 0.0
    used_at: float = 0.0

    @property
    def is_in_memory(self) -> bool:
        """Whether it answers now."""
        return self.state in IN_MEMORY

    def busy(self) -> str:
        """What keeps it from leaving, but for a pin; empty = nothing."""
        if self.state in LOADING:
            return "loading"
        if self.state == DRAINING:
            return "leaving"
        count = self.waits + self.holds
        return f"{count} request{'s' if count > 1 else ''}" if count else ""

    def told(self, is_default: bool) -> inference_pb2.LoadedAdapter:
        """As callers see it."""
        seen = inference_pb2.LoadedAdapter(
            adapter=self.name,
            digest=self.digest,
            base_digest=self.base_digest,
            rank=self.rank,
            memory_bytes=self.memory_bytes,
            load_seconds=self.load_seconds,
            probe_effect=self.probe_effect,
            is_default=is_default,
            state=self.state,
            state_reason=self.reason,
            pinned=self.pinned,
            in_flight=self.waits + self.holds,
        )
        if self.loaded_at:
            seen.load_time.FromNanoseconds(int(self.loaded_at * 1e9))
        if self.used_at:
            seen.last_used_time.FromNanoseconds(int(self.used_at * 1e9))
        return seen


@dataclass(frozen=True, slots=True)
class Table:
    """Every adapter that is in memory, on its way, wanted by a request, or lately refused; oldest first."""

    entries: Mapping[str, Entry] = field(default_factory=lambda: MappingProxyType({}))

    def get(self, digest: str) -> Entry | None:
        """An adapter, or None if nothing is known of it."""
        return self.entries.get(digest)

    def state(self, digest: str) -> State:
        """Where an adapter is."""
        entry = self.entries.get(digest)
        return ABSENT if entry is None else entry.state

    def of_base(self, base_digest: str) -> list[Entry]:
        """The adapters of one base."""
        return [e for e in self.entries.values() if e.base_digest == base_digest]

    def items(self) -> list[Item]:
        """What takes memory, as the budget sees it.

        One that leaves and that nobody uses any more counts no longer: its bytes are
        spoken for by whom it leaves for, who waits until they are free.
        """
        return [
            Item(
                e.digest, e.name, e.memory_bytes, e.used_tick, e.pinned, e.busy(),
                requests=e.holds if e.is_in_memory else 0, leaves=e.state == DRAINING,
            )
            for e in self.entries.values()
            if e.state not in (ABSENT, REJECTED) and (e.state != DRAINING or e.holds)
        ]  # fmt: skip

    def listed(self, default_digest: str) -> list[inference_pb2.LoadedAdapter]:
        """What callers see; what is only asked for is not there yet."""
        return [e.told(e.digest == default_digest) for e in self.entries.values() if e.state != ABSENT]

    # requests

    def asked(self, digest: str, name: str, base_digest: str) -> Table:
        """A request waits for an adapter, under this name."""
        known = self.entries.get(digest) or Entry(digest, name, base_digest)
        return self._with(dataclasses.replace(known, name=name, waits=known.waits + 1))

    def gave_up(self, digest: str) -> Table:
        """A request waits no longer, whether it got it or not."""
        entry = self.entries[digest]
        return self._with(dataclasses.replace(entry, waits=entry.waits - 1))

    def granted(self, digest: str, now: Moment) -> Table:
        """A request that waits for it uses it now."""
        entry = self.entries[digest]
        if not entry.is_in_memory:
            raise ValueError(f"{entry.name} cannot be used in state {entry.state}")
        return self._with(
            dataclasses.replace(entry, holds=entry.holds + 1, used_tick=now.tick, used_at=now.wall)
        )  # fmt: skip

    def released(self, digest: str, now: Moment) -> Table:
        """A request that used it has ended."""
        entry = self.entries[digest]
        return self._with(
            dataclasses.replace(entry, holds=entry.holds - 1, used_tick=now.tick, used_at=now.wall)
        )  # fmt: skip

    # moves

    def fetching(self, digest: str) -> Table:
        """It is being read."""
        return self._moved(digest, FETCHING, reason="")

    def reserved(self, digest: str, memory_bytes: int) -> Table:
        """Room was made for so many bytes of it."""
        return self._with(dataclasses.replace(self.entries[digest], memory_bytes=memory_bytes))

    def verifying(self, digest: str) -> Table:
        """It is being proven."""
        return self._moved(digest, VERIFYING)

    def arrived(
        self, digest: str, now: Moment, *, rank: int, memory_bytes: int, load_seconds: float, probe_effect: float
    ) -> Table:
        """It is in memory and proven."""
        return self._moved(
            digest, HOST, rank=rank, memory_bytes=memory_bytes, load_seconds=load_seconds, probe_effect=probe_effect,
            loaded_at=now.wall, used_tick=now.tick,
        )  # fmt: skip

    def rejected(self, digest: str, reason: str) -> Table:
        """It is refused; it stays listed, last, until there are too many of its kind."""
        moved = self._moved(digest, REJECTED, reason=reason, memory_bytes=0, pinned=False)
        entries = dict(moved.entries)
        entries[digest] = entries.pop(digest)
        refused = [e for e in entries.values() if e.state == REJECTED]
        for entry in refused[: max(0, len(refused) - REJECTED_KEPT)]:
            entries[entry.digest] = dataclasses.replace(entry, state=ABSENT, reason="")
        return _kept(entries)

    def leaving(self, digest: str) -> Table:
        """It takes no new requests."""
        return self._moved(digest, DRAINING, pinned=False)

    def absent(self, digest: str) -> Table:
        """It is only in the store."""
        return self._moved(digest, ABSENT, memory_bytes=0, holds=0, reason="")

    def lost(self, base_digest: str) -> Table:
        """Its base's engine is gone, and all that was in it; what was refused stays refused."""
        table = self
        for entry in self.of_base(base_digest):
            if entry.state not in (ABSENT, REJECTED):
                table = table.absent(entry.digest)
        return table

    def on_device(self, base_digest: str, digests: Iterable[str]) -> Table:
        """What a base's engine tells of its tiers."""
        there, table = set(digests), self
        for entry in self.of_base(base_digest):
            if entry.is_in_memory and (entry.state == DEVICE) != (entry.digest in there):
                table = table._moved(entry.digest, DEVICE if entry.digest in there else HOST)
        return table

    def pinned(self, digest: str) -> Table:
        """It does not make room for others any more."""
        return self._with(dataclasses.replace(self.entries[digest], pinned=True))

    def touched(self, digest: str, now: Moment) -> Table:
        """Somebody asked for it without using it."""
        return self._with(dataclasses.replace(self.entries[digest], used_tick=now.tick))

    def _moved(self, digest: str, state: State, **told: object) -> Table:
        entry = self.entries[digest]
        if state not in LAW[entry.state]:
            raise ValueError(f"{entry.name} cannot go from {entry.state} to {state}")
        return self._with(dataclasses.replace(entry, state=state, **told))  # type: ignore[arg-type]

    def _with(self, entry: Entry) -> Table:
        return _kept({**self.entries, entry.digest: entry})


def _kept(entries: dict[str, Entry]) -> Table:
    """Without those of which nobody has a reason to know."""
    gone = [d for d, e in entries.items() if e.state == ABSENT and not e.waits and not e.holds]
    for digest in gone:
        del entries[digest]
    return Table(MappingProxyType(entries))
