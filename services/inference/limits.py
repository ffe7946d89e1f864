"""What each key may take: requests and tokens a minute, requests at a time, a priority.

Law of this room: pure; the clock is an argument. A bucket holds a minute's worth
and fills evenly. Tokens are known only as they come: a request begins while
anything is left, and what it takes beyond that is owed by those after it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, show

EVERYBODY = "*"
MAX_PRIORITY = 10
_LARGEST = 1_000_000_000
KINDS: Mapping[str, tuple[int, int]] = MappingProxyType({
    "requests_per_minute": (1, _LARGEST),
    "tokens_per_minute": (1, _LARGEST),
    "max_in_flight": (1, _LARGEST),
    "max_priority": (0, MAX_PRIORITY),
})  # fmt: skip
"""What can be bounded, and by how little and how much."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Bounds of one key; 0 = none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_in_flight: int = 0
    max_priority: int | None = None
    """None = 0 of a key, so that no key overtakes others unless it is said; 10 where there are no keys."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds by the name of a key."""

    named: Mapping[str, Limit] = field(default_factory=dict)

    def of(self, name: str) -> Limit:
        """The bounds of a key: its own, else those of everybody, else none."""
        return self.named.get(name) or self.named.get(EVERYBODY) or Limit()

    def highest(self, name: str) -> int:
        """The highest priority that a key may ask for."""
        said = self.of(name).max_priority
        return said if said is not None else 0 if name else MAX_PRIORITY


def read(tree: object, known: Collection[str]) -> tuple[Limits, list[str]]:
    """Limits from the plain values of a file, and ALL that is wrong with them.

    `known` are the names of the tokens that the daemon takes.
    """
    if not isinstance(tree, Mapping):
        return Limits(), ["must be a mapping of names (or '*') to limits"]
    faults: list[str] = []
    named: dict[str, Limit] = {}
    for name, values in tree.items():
        if name != EVERYBODY and name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(
                f"{name}: no token has this name{hint}; accepted: a name of --tokens-file, or '*' for all others"
            )
        if not isinstance(values, Mapping):
            faults.append(f"{name}: got {show(values)}; accepted: a mapping with any of {', '.join(KINDS)}")
            continue
        good: dict[str, int] = {}
        for key, value in values.items():
            if key not in KINDS:
                faults.append(f"{name}.{key}: no such limit; accepted: {', '.join(KINDS)}")
            elif isinstance(value, bool) or not isinstance(value, int) or not KINDS[key][0] <= value <= KINDS[key][1]:
                faults.append(f"{name}.{key}: got {show(value)}; accepted: {KINDS[key][0]} to {KINDS[key][1]}")
            else:
                good[str(key)] = value
        named[str(name)] = Limit(**good)
    return Limits(named), faults


@dataclass(slots=True)
class Bucket:
    """So many a minute. Begins full; may be owed to."""

    per_minute: int
    _level: float = field(init=False)
    _at: float = 0.0

    def __post_init__(self) -> None:
        self._level = float(self.per_minute)

    def wait(self, now: float, need: float) -> float:
        """Seconds until there is so much; 0 = now. More than a minute's worth is asked for as a full bucket."""
        self._fill(now)
        lack = min(need, self.per_minute) - self._level
        return max(0.0, lack * 60.0 / self.per_minute)

    def take(self, now: float, amount: float) -> None:
        """Takes it, also what is not there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self.per_minute, self._level + max(0.0, now - self._at) * self.per_minute / 60.0)
        self._at = max(now, self._at)


@dataclass(slots=True)
class _Key:
    requests: Bucket | None
    tokens: Bucket | None
    in_flight: int = 0


class Meter:
    """How much each key has taken. Keys are few: the names of tokens, and none."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._keys: dict[str, _Key] = {}

    def begin(self, name: str, requests: int, width: int, now: float) -> int:
        """Lets requests of a key in; so many of them, at most `width`, may run at a time.

        RATE_LIMITED, with nothing taken, names the bound and the seconds after which to come again.
        """
        limit, key = self._limits.of(name), self._key(name, now)
        granted = min(width, limit.max_in_flight - key.in_flight) if limit.max_in_flight else width
        if granted < 1:
            raise _limited(name, "max_in_flight", limit.max_in_flight, "requests at a time", 1.0)
        if key.tokens is not None and (seconds := key.tokens.wait(now, 1.0)):
            raise _limited(name, "tokens_per_minute", limit.tokens_per_minute, "tokens a minute", seconds)
        if key.requests is not None and (seconds := key.requests.wait(now, requests)):
            raise _limited(name, "requests_per_minute", limit.requests_per_minute, "requests a minute", seconds)
        if key.requests is not None:
            key.requests.take(now, requests)
        key.in_flight += granted
        return granted

    def took(self, name: str, tokens: int, now: float) -> None:
        """Notes tokens of a prompt or an answer."""
        key = self._key(name, now)
        if key.tokens is not None:
            key.tokens.take(now, tokens)

    def end(self, name: str, granted: int) -> None:
        """What `begin` granted has ended."""
        self._keys[name].in_flight -= granted

    def highest(self, name: str) -> int:
        """The highest priority that a key may ask for."""
        return self._limits.highest(name)

    def in_flight(self, name: str) -> int:
        """Requests of a key that may run now."""
        return self._keys[name].in_flight if name in self._keys else 0

    def _key(self, name: str, now: float) -> _Key:
        if name not in self._keys:
            limit = self._limits.of(name)
            self._keys[name] = _Key(
                Bucket(limit.requests_per_minute, now) if limit.requests_per_minute else None,
                Bucket(limit.tokens_per_minute, now) if limit.tokens_per_minute else None,
            )
        return self._keys[name]


def _limited(name: str, kind: str, bound: int, unit: str, seconds: float) -> Fault:
    who = f"key {name!r}" if name else "callers without a key"
    return Fault(
        errors_pb2.REASON_RATE_LIMITED,
        f"{who} may take {bound} {unit}; come again in {seconds:.1f} s",
        retry_seconds=math.ceil(seconds * 1000) / 1000,
        metadata={"limit": kind},
    )
