"""Which steps there are: those built in, and those that plug-ins bring.

Law of this room: a plug-in is loaded only when its step is asked for, or when
all are to be told; one that cannot be loaded is named, with its package.
"""

from __future__ import annotations

import importlib
import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qlorad.v1 import datasets_pb2
from services.datasets.worker.steps.schema import schema_of

GROUP = "qlorad.steps"
OURS = "qlorad-services"
log = logging.getLogger("qlorad.steps")

_BUILT_IN: Mapping[str, str] = {
    "as_instruction": "shaping:AsInstruction",
    "as_text": "shaping:AsText",
    "citations": "citations:Citations",
    "keep_languages": "choosing:KeepLanguages",
    "line_ends": "writing:LineEnds",
    "max_characters": "choosing:MaxCharacters",
    "max_words": "choosing:MaxWords",
    "metadata": "shaping:Metadata",
    "min_words": "choosing:MinWords",
    "notation": "notation:Notation",
    "redact": "redacting:Redact",
    "sample": "choosing:Sample",
    "strip_tags": "writing:StripTags",
    "system_prompt": "shaping:SystemPrompt",
    "unicode": "writing:Unicode",
    "whitespace": "writing:Whitespace",
}


class Broken(Exception):
    """A step that cannot be loaded: what it is and why, without an inside story."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A step as it may be asked for."""

    name: str
    package: str
    step: type
    schema: Mapping[str, Any]
    is_ours: bool

    def told(self) -> datasets_pb2.StepKind:
        """As ListSteps tells it."""
        said = (self.step.__doc__ or "").strip().splitlines()
        return datasets_pb2.StepKind(
            name=self.name,
            description=said[0] if said else "",
            package=self.package,
            parameters_schema_json=json.dumps(self.schema, ensure_ascii=False),
        )


class Kinds:
    """The steps of this installation."""

    def __init__(self) -> None:
        self._brought: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=GROUP):
            self._brought.setdefault(point.name, []).append(point)

    def names(self) -> list[str]:
        """All of them, loaded or not."""
        return sorted({*_BUILT_IN, *self._brought})

    def load(self, name: str) -> Kind | None:
        """The step of a name; None where there is none; Broken where it cannot be loaded."""
        points = self._brought.get(name, [])
        if name in _BUILT_IN:
            if points:
                raise Broken(f"{name!r} of {_packages(points)} has the name of a step that is built in")
            module, _, cls = _BUILT_IN[name].partition(":")
            step = getattr(importlib.import_module(f"services.datasets.worker.steps.{module}"), cls)
            return Kind(name, f"{OURS} {metadata.version(OURS)}", step, schema_of(step), True)
        if len(points) > 1:
            raise Broken(f"{name!r} is brought by {_packages(points)}; accepted: one of them")
        return _loaded(name, points[0]) if points else None


def _loaded(name: str, point: metadata.EntryPoint) -> Kind:
    package = _packages([point])
    try:
        step = point.load()
    except (Exception, SystemExit) as e:
        log.error("the step %r of %s cannot be loaded\n%s", name, package, "".join(traceback.format_exception(e)))
        missing = f" of {e.name!r}" if isinstance(e, ImportError) and e.name else ""
        raise Broken(f"{name!r} of {package} cannot be loaded: {type(e).__name__}{missing}") from None
    try:
        return Kind(name, package, step, schema_of(step), False)
    except (TypeError, NameError) as e:
        raise Broken(f"{name!r} of {package} is no step: {e}") from None


def _packages(points: Sequence[metadata.EntryPoint]) -> str:
    return " and ".join(sorted(f"{p.dist.name} {p.dist.version}" if p.dist else "an unknown package" for p in points))
