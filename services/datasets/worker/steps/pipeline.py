"""Pipelines: steps that change rows, or leave them out, in the order in which they were asked for.

Law of this room: a step sees one row at a time and nothing else, so rows can be
worked on in any order and by several processes. What a plug-in's step returns is
looked at before it is believed.
"""

from __future__ import annotations

import difflib
import logging
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from google.protobuf import json_format

from qlorad.v1 import datasets_pb2
from services.common import parameters
from services.common.errors import Violation, invalid, show
from services.common.worker.plugins import Broken, Kind
from services.datasets.worker.found import Problem
from services.datasets.worker.plain import Plain
from services.datasets.worker.steps.kinds import steps as known_steps

log = logging.getLogger("qlorad.steps")


@dataclass(frozen=True, slots=True)
class _Stage:
    """One step at its place."""

    name: str
    """INDEX:NAME, as in "0:citations"; the index is that of the request."""
    kind: Kind
    step: Any


@dataclass(eq=False)
class StepFailed(Exception):
    """A step raised, or returned what is no example: the row is not to be used.

    Not frozen: Python itself sets the traceback on an exception.
    """

    problem: Problem


class Pipeline:
    """Steps in order, and what they did."""

    def __init__(self, stages: Sequence[_Stage] = (), applied: Sequence[datasets_pb2.AppliedStep] = ()) -> None:
        self._stages = tuple(stages)
        self.dropped: Counter[str] = Counter()
        """Rows left out, by INDEX:NAME."""
        self.changed: Counter[str] = Counter()
        self.applied = list(applied)
        self._told: set[str] = set()

    @classmethod
    def load(cls, steps: Sequence[datasets_pb2.Step], path: str = "") -> Pipeline:
        """The pipeline of a request; INVALID_ARGUMENT with every violation, under `path`."""
        if not steps:
            return cls()
        kinds, wrong = known_steps(), []
        stages: list[_Stage] = []
        applied: list[datasets_pb2.AppliedStep] = []
        for i, asked in enumerate(steps):
            field = f"{path}steps[{i}]"
            try:
                kind = kinds.load(asked.name)
            except Broken as e:
                wrong.append(Violation(f"{field}.name", f"{show(asked.name)} ({e})", "a step whose package works"))
                continue
            if kind is None:
                wrong.append(Violation(f"{field}.name", show(asked.name), _nearest(asked.name, kinds.names())))
                continue
            told, violations = parameters.values(kind.schema, asked.parameters, f"{field}.parameters")
            wrong += violations
            if violations:
                continue
            try:
                stages.append(_Stage(f"{i}:{kind.name}", kind, parameters.made(kind.type, told)))
            except ValueError as e:
                given = ", ".join(f"{k} {show(v)}" for k, v in told.items())
                wrong.append(Violation(f"{field}.parameters", given, str(e)))
                continue
            step = datasets_pb2.Step(name=kind.name)
            step.parameters.update(told)
            applied.append(datasets_pb2.AppliedStep(step=step, package=kind.package))
        if wrong:
            raise invalid(wrong)
        return cls(stages, applied)

    def __len__(self) -> int:
        return len(self._stages)

    def apply(self, example: Plain) -> Plain | None:
        """The row behind the last step; None where a step left it out; StepFailed where one failed."""
        for stage in self._stages:
            after = self._within(stage, example) if stage.kind.is_ours else self._brought(stage, example)
            if after is None:
                self.dropped[stage.name] += 1
                return None
            if after is not example:
                self.changed[stage.name] += 1
                example = after
        return example

    def _within(self, stage: _Stage, example: Plain) -> Plain | None:
        try:
            return stage.step.apply(example)
        except MemoryError:
            raise
        except Exception as e:
            raise self._failed(stage, e, f"failed with {type(e).__name__}") from None

    def _brought(self, stage: _Stage, example: Plain) -> Plain | None:
        """A plug-in's step gets a row of its own, and what it returns must be an example."""
        line = orjson.dumps(example, option=orjson.OPT_SORT_KEYS)
        after = self._within(stage, orjson.loads(line))
        if after is None:
            return None
        try:
            if orjson.dumps(after, option=orjson.OPT_SORT_KEYS) == line:
                return example
            said = datasets_pb2.Example()
            json_format.ParseDict(after, said)
            if said.WhichOneof("body") is None:
                raise ValueError("no body")
            return orjson.loads(orjson.dumps(after))
        except (TypeError, ValueError, AttributeError, json_format.ParseError) as e:
            raise self._failed(stage, e, "returned what is no example") from None

    def _failed(self, stage: _Stage, error: Exception, told: str) -> StepFailed:
        """The log gets the story, without the message (it may show the row) and once for each step."""
        if stage.name not in self._told:
            self._told.add(stage.name)
            story = "".join(traceback.format_tb(error.__traceback__))
            log.error("step %s of %s %s: %s\n%s", stage.name, stage.kind.package, told, type(error).__name__, story)
        hint = f"leave the step out, or tell who made {stage.kind.package}"
        return StepFailed(Problem("step_failed", f"the step {stage.kind.name} {told}", hint, f"steps[{stage.name}]"))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return (f"nearest {', '.join(close)}; " if close else "") + f"one of {', '.join(known)}"
