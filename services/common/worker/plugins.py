"""Classes found by name: those built in, and those that packages bring by an entry point.

Law of this room: only workers look here. A plug-in is loaded only when it is
asked for, or when all are to be told; one that cannot be loaded is named, with
its package.
"""

from __future__ import annotations

import importlib
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from services.common.parameters import schema_of

OURS = "qlorad-services"
log = logging.getLogger("qlorad.plugins")


class Broken(Exception):
    """A plug-in that cannot be loaded: what it is and why, without an inside story."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A class as it may be asked for."""

    name: str
    package: str
    """With its version, as in "qlorad-services 0.1"."""
    type: type
    schema: Mapping[str, Any]
    is_ours: bool

    @property
    def description(self) -> str:
        """The first line of its docstring."""
        said = (self.type.__doc__ or "").strip().splitlines()
        return said[0] if said else ""


@dataclass(frozen=True, slots=True)
class Sort:
    """One sort of plug-ins."""

    group: str
    """Of the entry points."""
    noun: str
    """As in "step"."""
    method: str
    """What each class must have, as in "apply(example)"."""
    built_in: Mapping[str, str]
    """By name, as in "package.module:Class"."""


class Kinds:
    """The plug-ins of one sort in this installation."""

    def __init__(self, sort: Sort) -> None:
        self._sort = sort
        self._brought: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=sort.group):
            self._brought.setdefault(point.name, []).append(point)

    def names(self) -> list[str]:
        """All of them, loaded or not."""
        return sorted({*self._sort.built_in, *self._brought})

    def load(self, name: str) -> Kind | None:
        """The class of a name; None where there is none; Broken where it cannot be loaded."""
        points = self._brought.get(name, [])
        if name in self._sort.built_in:
            if points:
                raise Broken(f"{name!r} of {_packages(points)} has the name of a {self._sort.noun} that is built in")
            module, _, cls = self._sort.built_in[name].partition(":")
            found = getattr(importlib.import_module(module), cls)
            version = f"{OURS} {metadata.version(OURS)}"
            return Kind(name, version, found, schema_of(found, self._sort.method), True)
        if len(points) > 1:
            raise Broken(f"{name!r} is brought by {_packages(points)}; accepted: one of them")
        return self._loaded(name, points[0]) if points else None

    def all(self) -> tuple[list[Kind], list[str]]:
        """Every one that can be loaded, by name, and what is wrong with the others."""
        found, broken = [], []
        for name in self.names():
            try:
                kind = self.load(name)
            except Broken as e:
                broken.append(str(e))
            else:
                assert kind is not None
                found.append(kind)
        return found, broken

    def _loaded(self, name: str, point: metadata.EntryPoint) -> Kind:
        package, noun = _packages([point]), self._sort.noun
        try:
            found = point.load()
        except (Exception, SystemExit) as e:
            log.error("the %s %r of %s cannot be loaded\n%s", noun, name, package, _story(e))
            missing = f" of {e.name!r}" if isinstance(e, ImportError) and e.name else ""
            raise Broken(f"{name!r} of {package} cannot be loaded: {type(e).__name__}{missing}") from None
        try:
            return Kind(name, package, found, schema_of(found, self._sort.method), False)
        except (TypeError, NameError) as e:
            raise Broken(f"{name!r} of {package} is no {noun}: {e}") from None


def _story(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _packages(points: Sequence[metadata.EntryPoint]) -> str:
    return " and ".join(sorted(f"{p.dist.name} {p.dist.version}" if p.dist else "an unknown package" for p in points))
