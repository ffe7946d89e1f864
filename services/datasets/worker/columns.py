"""What a column's values are as JSON: decided once by its type, done for every value.

Law of this room: pure. Nothing is guessed: a type that JSON cannot hold is
refused by name before a row is read, a value that it cannot hold is a problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from services.datasets.worker.found import Problem, Unreadable, clip
from services.datasets.worker.strict_json import MAX_DEPTH

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_EPOCH = date(1970, 1, 1)
_DAY = 86400


class NotPlain(Exception):
    """A value that JSON cannot hold."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Plain:
    """How a column becomes plain values."""

    cast: Any
    """The Arrow type to read it as; None = as it is."""
    each: Callable[[Any], Any] | None
    """What is done to every value that is not null; None = nothing."""

    def values(self, column: Any) -> list[Any]:
        """The values of a column. NotPlain or UnicodeDecodeError for one that cannot be told."""
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if self.cast is not None:
            column = column.cast(self.cast)
        values = column.to_pylist()
        each = self.each
        return values if each is None else [None if v is None else each(v) for v in values]


def plain(kind: Any, name: str, level: int = 2) -> Plain:
    """How values of an Arrow type become JSON. Unreadable for a type that cannot, naming the column."""
    if level > MAX_DEPTH + 1:
        told = f"the column is nested deeper than {MAX_DEPTH}"
        raise Unreadable(Problem("too_deep", told, f"at most {MAX_DEPTH} levels of lists and objects", name))
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return Plain(kind.storage_type, _uuid)
        inner = plain(kind.storage_type, name, level)
        return Plain(inner.cast or kind.storage_type, inner.each)
    if types.is_dictionary(kind):
        inner = plain(kind.value_type, name, level)
        return Plain(inner.cast or kind.value_type, inner.each)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list(kind, name, level)
    if types.is_struct(kind):
        return _struct(kind, name, level)
    if types.is_map(kind):
        return _map(kind, name, level)
    return _leaf(kind, name)


def _leaf(kind: Any, name: str) -> Plain:
    if types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind):
        return Plain(None, None)
    if types.is_boolean(kind) or types.is_null(kind):
        return Plain(None, None)
    if types.is_string_view(kind):
        return Plain(pa.large_string(), None)
    if types.is_floating(kind):
        return Plain(None, lambda v: _finite(v, name))
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return Plain(None, lambda v: _text(v, name))
    if types.is_decimal(kind):
        return Plain(None, lambda v: format(v, "f"))
    if types.is_date(kind):
        days = 1 if types.is_date32(kind) else _DAY * 1000
        return Plain(pa.int32() if days == 1 else pa.int64(), lambda v: _date(v // days, name))
    if types.is_timestamp(kind):
        zone = "Z" if kind.tz else ""
        return Plain(pa.int64(), lambda v: _moment(v, kind.unit, name) + zone)
    if types.is_time(kind):
        return Plain(pa.int32() if types.is_time32(kind) else pa.int64(), lambda v: _time(v, kind.unit, name))
    told = f"the column is of the type {clip(str(kind))}, which JSON cannot hold"
    raise Unreadable(Problem("unknown_type", told, "write it as text or numbers, or leave the column out", name))


def _list(kind: Any, name: str, level: int) -> Plain:
    inner = plain(kind.value_type, name, level + 1)
    cast = None
    if inner.cast is not None:
        cast = (pa.large_list if types.is_large_list(kind) else pa.list_)(inner.cast)
        if types.is_fixed_size_list(kind):
            cast = pa.list_(inner.cast, kind.list_size)
    each = inner.each
    return Plain(cast, None if each is None else lambda v: [None if x is None else each(x) for x in v])


def _struct(kind: Any, name: str, level: int) -> Plain:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    if len({f.name for f in fields}) != len(fields):
        raise Unreadable(Problem("twin_key", "two fields of one struct have the same name", "keep one", name))
    inner = {f.name: plain(f.type, f"{name}.{f.name}", level + 1) for f in fields}
    cast = None
    if any(p.cast is not None for p in inner.values()):
        cast = pa.struct([pa.field(f.name, inner[f.name].cast or f.type) for f in fields])
    eaches = {n: p.each for n, p in inner.items() if p.each is not None}
    if not eaches:
        return Plain(cast, None)
    return Plain(cast, lambda v: {k: eaches[k](x) if k in eaches and x is not None else x for k, x in v.items()})


def _map(kind: Any, name: str, level: int) -> Plain:
    if not (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
        told = f"the keys of the map are of the type {clip(str(kind.key_type))}"
        raise Unreadable(Problem("unknown_type", told, "a map with text keys", name))
    inner = plain(kind.item_type, name, level + 1)
    cast = None if inner.cast is None else pa.map_(kind.key_type, inner.cast)

    def each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = {k: None if v is None else (inner.each(v) if inner.each else v) for k, v in pairs}
        if len(made) != len(pairs):
            raise NotPlain(Problem("twin_key", "a key stands twice in one map", "keep one", name))
        return made

    return Plain(cast, each)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise NotPlain(Problem("not_finite", f"the number is {value}", "use null or a finite number", name))
    return value


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        told = f"{len(value)} bytes that are not UTF-8 text"
        raise NotPlain(Problem("binary_value", told, "leave the column out, or write it as text", name)) from None


def _uuid(value: bytes) -> str:
    digits = value.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _date(days: int, name: str) -> str:
    try:
        return (_EPOCH + timedelta(days=days)).isoformat()
    except OverflowError:
        told = f"{days} days from 1970 is no date between the years 1 and 9999"
        raise NotPlain(Problem("bad_date", told, "mend the date, or write it as text", name)) from None


def _moment(value: int, unit: str, name: str) -> str:
    seconds, rest = divmod(value, _UNITS[unit])
    days, second = divmod(seconds, _DAY)
    return f"{_date(days, name)}T{_clock(second, rest, unit)}"


def _time(value: int, unit: str, name: str) -> str:
    seconds, rest = divmod(value, _UNITS[unit])
    if not 0 <= seconds < _DAY:
        told = f"{value} {unit} is no time of a day"
        raise NotPlain(Problem("bad_date", told, "mend the time, or write it as text", name))
    return _clock(seconds, rest, unit)


def _clock(second: int, rest: int, unit: str) -> str:
    told = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    return f"{told}.{rest:0{_DIGITS[unit]}d}".rstrip("0") if rest else told
