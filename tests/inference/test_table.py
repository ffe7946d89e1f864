"""The adapters' states: only along the law, bytes within the budget, nobody in use leaves, nothing lingers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.inference import budget
from services.inference.adapters import (
    ABSENT,
    DEVICE,
    DRAINING,
    FETCHING,
    HOST,
    IN_MEMORY,
    LAW,
    REJECTED,
    REJECTED_KEPT,
    VERIFYING,
    Moment,
    Table,
)  # fmt: skip

LIMIT = 100
DIGESTS = [f"sha256:{n}" for n in range(6)]
BASES = ["sha256:x", "sha256:y"]
digests = st.sampled_from(DIGESTS)


def base_of(digest: str) -> str:
    return BASES[int(digest[-1]) % 2]


class Adapters(RuleBasedStateMachine):
    """Requests, loads, evictions, losses in any order, as the roster makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.tick = 0.0
        self.waiting: dict[str, int] = dict.fromkeys(DIGESTS, 0)
        self.using: dict[str, int] = dict.fromkeys(DIGESTS, 0)

    def now(self) -> Moment:
        self.tick += 1
        return Moment(self.tick, 1e9 + self.tick)

    def become(self, table: Table) -> None:
        for digest in {*table.entries, *self.table.entries}:
            old, new = self.table.state(digest), table.state(digest)
            assert old == new or new in LAW[old], (old, new)
        self.table = table

    @rule(digest=digests)
    def ask(self, digest: str) -> None:
        self.waiting[digest] += 1
        self.become(self.table.asked(digest, f"adapters/{digest[-1]}", base_of(digest)))

    @rule(digest=digests)
    def grant_or_give_up(self, digest: str) -> None:
        if not self.waiting[digest]:
            return
        self.waiting[digest] -= 1
        if self.table.state(digest) in IN_MEMORY:
            self.using[digest] += 1
            self.become(self.table.granted(digest, self.now()))
        self.become(self.table.gave_up(digest))

    @rule(digest=digests)
    def release(self, digest: str) -> None:
        if self.using[digest]:
            self.using[digest] -= 1
            self.become(self.table.released(digest, self.now()))

    @rule(digest=digests, need=st.integers(1, 60))
    def fetch(self, digest: str, need: int) -> None:
        if not self.waiting[digest] or self.table.state(digest) not in (ABSENT, REJECTED):
            return
        self.become(self.table.fetching(digest))
        verdict = budget.decide([i for i in self.table.items() if i.key != digest], need, LIMIT)
        if not verdict.fits:
            self.become(self.table.absent(digest))
            return
        for victim in verdict.leave:
            assert not self.using[victim] and not self.waiting[victim] and not self.table.entries[victim].pinned
            self.become(self.table.leaving(victim))
            self.become(self.table.absent(victim))
        self.become(self.table.reserved(digest, need))

    @rule(digest=digests, good=st.booleans())
    def go_on(self, digest: str, good: bool) -> None:
        entry = self.table.get(digest)
        if entry is None:
            return
        if entry.state == FETCHING and entry.memory_bytes:
            self.become(self.table.verifying(digest) if good else self.table.rejected(digest, "check 'effect'"))
        elif entry.state == VERIFYING and good:
            self.become(
                self.table.arrived(
                    digest, self.now(), rank=4, memory_bytes=entry.memory_bytes, load_seconds=0.1, probe_effect=1.0
                )
            )
        elif entry.state == VERIFYING:
            self.become(self.table.rejected(digest, "check 'effect'"))

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        if self.table.state(digest) in IN_MEMORY:
            self.become(self.table.pinned(digest))

    @rule(digest=digests)
    def unload(self, digest: str) -> None:
        if self.table.state(digest) in IN_MEMORY:
            self.become(self.table.leaving(digest))

    @rule(digest=digests)
    def leave(self, digest: str) -> None:
        if self.table.state(digest) == DRAINING and not self.using[digest]:
            self.become(self.table.absent(digest))

    @rule(base=st.sampled_from(BASES), there=st.sets(digests))
    def tiers(self, base: str, there: set[str]) -> None:
        self.become(self.table.on_device(base, there))
        for entry in self.table.of_base(base):
            if entry.is_in_memory:
                assert (entry.state == DEVICE) == (entry.digest in there)

    @rule(base=st.sampled_from(BASES))
    def lose(self, base: str) -> None:
        self.become(self.table.lost(base))
        for digest in DIGESTS:
            if base_of(digest) == base:
                self.using[digest] = 0
                assert self.table.state(digest) in (ABSENT, REJECTED)

    @invariant()
    def counts_are_right(self) -> None:
        for digest in DIGESTS:
            entry = self.table.get(digest)
            assert (entry.waits if entry else 0) == self.waiting[digest]
            assert (entry.holds if entry else 0) == self.using[digest]

    @invariant()
    def bytes_are_within_the_budget(self) -> None:
        assert sum(item.bytes for item in self.table.items()) <= LIMIT

    @invariant()
    def nothing_lingers_and_only_the_refused_have_a_reason(self) -> None:
        for entry in self.table.entries.values():
            assert entry.state != ABSENT or entry.waits
            assert bool(entry.reason) == (entry.state == REJECTED)
            assert entry.memory_bytes == 0 or entry.state not in (ABSENT, REJECTED)
        assert all(a.state != ABSENT for a in self.table.listed(""))

    @precondition(lambda self: self.table.entries)
    @rule(data=st.data())
    def what_is_against_the_law_is_refused(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(list(self.table.entries.values())))
        if entry.state not in IN_MEMORY:
            with pytest.raises(ValueError, match="cannot"):
                self.table.granted(entry.digest, self.now())
        if HOST not in LAW[entry.state]:
            with pytest.raises(ValueError, match="cannot go"):
                self.table.arrived(entry.digest, self.now(), rank=1, memory_bytes=1, load_seconds=1.0, probe_effect=1.0)


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_only_so_many_that_were_refused_stay_listed_the_latest_last() -> None:
    table = Table()
    for number in range(REJECTED_KEPT + 5):
        digest = f"sha256:{number}"
        table = table.asked(digest, f"adapters/a{number}", "sha256:b").fetching(digest).rejected(digest, "why")
        table = table.gave_up(digest)
    listed = table.listed("")
    assert len(listed) == REJECTED_KEPT
    assert (listed[0].adapter, listed[-1].adapter) == ("adapters/a5", f"adapters/a{REJECTED_KEPT + 4}")
    assert listed[-1].state_reason == "why"


def test_an_adapter_is_called_what_it_was_last_asked_by() -> None:
    table = Table().asked("sha256:1", "adapters/best", "sha256:b").asked("sha256:1", "adapters/newer", "sha256:b")
    assert table.entries["sha256:1"].name == "adapters/newer"
