"""Whether a job's objective can be had: its name, its parameters, the model and the batches.

Law of this room: pure. A model of masks learns masks, any other next tokens;
which of the two was not said bends, what was said is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from qlorad.v1 import trainer_pb2
from services.common import parameters
from services.common.errors import Violation, show

MASKED = "masked-lm"
PLAIN = frozenset({"", "completion", MASKED})
"""They need no look at what is installed, where nothing is said to them."""
Schemas = Mapping[str, Mapping[str, Any]]
_NAME, _PARAMETERS = "spec.train.objective.name", "spec.train.objective.parameters"


def needs_look(objective: trainer_pb2.Objective) -> bool:
    """Whether an objective can be judged only by what is installed."""
    return objective.name not in PLAIN or bool(objective.parameters.fields)


def is_masked(architecture: str) -> bool:
    """Whether a model sees both sides of a token."""
    return architecture.endswith("ForMaskedLM")


def bend(train: trainer_pb2.TrainSpec, given: frozenset[str], architecture: str) -> None:
    """Fits an inherited objective to the model, and inherited batches to the objective."""
    if is_masked(architecture) and _NAME not in given:
        train.objective.Clear()
        train.objective.name = MASKED
    if train.objective.name == MASKED and "spec.train.data.packing" not in given:
        train.data.packing = False


def check(train: trainer_pb2.TrainSpec, architecture: str, schemas: Schemas | None) -> Iterator[Violation]:
    """All that is wrong; fills parameters that were left out. No architecture: the model is not known."""
    objective = train.objective
    if schemas is not None:
        if objective.name not in schemas:
            near = difflib.get_close_matches(objective.name, schemas, 1, 0.5)
            accepted = ", ".join(sorted(schemas)) + (f"; did you mean {near[0]!r}?" if near else "")
            yield Violation(_NAME, show(objective.name), accepted)
            return
        told, wrong = parameters.values(schemas[objective.name], objective.parameters, _PARAMETERS)
        yield from wrong
        if not wrong:
            objective.parameters.update(told)
    masked = objective.name == MASKED
    if architecture and masked != is_masked(architecture):
        accepted = MASKED if is_masked(architecture) else f"one of next tokens, as completion, for a {architecture}"
        yield Violation(_NAME, show(objective.name), accepted)
    if masked and train.data.packing:
        accepted = f"False where objective is {MASKED}: packed rows would see one another"
        yield Violation("spec.train.data.packing", "True", accepted)
    if masked and train.parallelism.ranks > 1:
        yield Violation("spec.train.parallelism.ranks", show(train.parallelism.ranks), f"1 where objective is {MASKED}")
