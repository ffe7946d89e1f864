"""Whether a worker shows life, judged from what was seen of its signs.

Law of this room: pure. Silence is counted only while somebody looks: a daemon
that was stopped itself, or a machine that slept, never takes its own absence
for a worker's. Time comes in with the look.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

FORMAT: Final = struct.Struct("<QQ")
"""A worker's sign: how often its thread beat, how often its main loop came round."""
SIGN: Final = "life"
"""The sign of a worker of one process; ranks write `life.0`, `life.1`, ..."""
FIRST: Final = ""
"""What stands for the worker before any process of it showed a sign."""
BEATS: Final = 4
"""So often a heartbeat the thread beats."""
OVERDUE: Final = 1.5
"""Silence of so many heartbeats is too long; it is noticed before the second is over."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One process: its newest sign, and how long each half of it has not changed."""

    beats: int
    turns: int
    silent_seconds: float = 0.0
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is known of an attempt's processes."""

    looked: float
    heartbeat_seconds: float
    """As the worker was told; 0 = a worker of before, which shows nothing and is not judged."""
    stuck_seconds: float
    processes: Mapping[str, Seen] = field(default_factory=dict)

    def look(self, signs: Mapping[str, bytes], now: float) -> Pulse:
        """The pulse after one more look. A look that comes late counts for half a heartbeat at most."""
        passed = min(max(0.0, now - self.looked), self.heartbeat_seconds / 2)
        told = {name: FORMAT.unpack(sign) for name, sign in signs.items() if len(sign) == FORMAT.size}
        if not told:
            told = {FIRST: (0, 0)}
        processes = {}
        for name, (beats, turns) in told.items():
            before = self.processes.get(name, Seen(-1, -1))
            processes[name] = Seen(
                beats,
                turns,
                0.0 if beats != before.beats else before.silent_seconds + passed,
                0.0 if turns != before.turns else before.idle_seconds + passed,
            )
        return Pulse(now, self.heartbeat_seconds, self.stuck_seconds, processes)

    def verdict(self) -> str:
        """Why the worker counts as stuck; empty = it does not."""
        if self.heartbeat_seconds <= 0:
            return ""
        for name, seen in sorted(self.processes.items()):
            who = f" of {name}" if name not in (FIRST, SIGN) else ""
            if name != FIRST and seen.silent_seconds > OVERDUE * self.heartbeat_seconds:
                return f"stuck: no sign of life{who} for {seen.silent_seconds:.0f} s"
            if seen.idle_seconds > self.stuck_seconds:
                return f"stuck: no progress{who} for {seen.idle_seconds:.0f} s, though it lives"
        return ""
