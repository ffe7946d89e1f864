"""Where a job's wishes are settled: template and overrides, names on the shelf, what it would take.

Law of this room: reads the shelf, writes nothing; what is right and wrong is
decided in spec.py and its neighbours. Names become digests here, once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common import facts, shards
from services.common.brought import Listing
from services.common.errors import Fault, Violation, invalid, not_found, rejected, show
from services.common.safetensors_header import read_model_headers
from services.common.shelf import Shelf
from services.trainer import estimate, history, objective, shape, slots, spec
from services.trainer.objectives import schemas as schemas_of
from services.trainer.spec import DatasetKnown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settled:
    """What will run."""

    template: str
    spec: trainer_pb2.JobSpec
    dataset: DatasetKnown


class Desk:
    """Templates, objectives, and the shelf that specs speak of."""

    def __init__(
        self,
        shelf: Shelf,
        templates: Mapping[str, trainer_pb2.JobTemplate],
        objectives: Listing[trainer_pb2.ObjectiveKind],
        host: spec.Host,
        devices: Sequence[str],
    ) -> None:
        self._shelf = shelf
        self.templates = templates
        self.objectives = objectives
        self._host = host
        self._devices = devices

    async def schemas(self, template_name: str, override: trainer_pb2.JobSpec) -> objective.Schemas | None:
        """What may be said to the objectives; None where nothing is."""
        template = self.templates.get(template_name or "standard")
        wanted = spec.merged(template, override) if template is not None else override
        if not objective.needs_look(wanted.train.objective):
            return None
        return schemas_of(await self.objectives.list())

    def settle(
        self,
        template_name: str,
        override: trainer_pb2.JobSpec,
        wrong: list[Violation],
        schemas: objective.Schemas | None,
    ) -> Settled:
        """Template, resolved spec and dataset; `wrong` holds what else is wrong with the request."""
        missing: list[Fault] = []
        template = self.templates.get(template_name or "standard")
        if template is None:
            missing.append(not_found(f"templates/{template_name}", [f"templates/{n}" for n in self.templates]))
            template = self.templates["standard"]
        wanted = spec.merged(template, override)
        unusable = spec.names_wanted(wanted)
        bad = {v.field for v in unusable}
        model = dataset = None
        if "spec.train.model" not in bad:
            model = self._look_up(lambda: self._model(wanted.train.model), missing)
        if "spec.train.dataset" not in bad:
            dataset = self._look_up(lambda: self._dataset(wanted.train.dataset), missing)
        resolved = spec.resolve(template, override, model, dataset, self._host, schemas)
        wrong += [*unusable, *resolved.violations]
        devices = self._devices
        if slots.needed(wanted.train, devices) > len(devices) and "spec.train.parallelism.ranks" not in {
            v.field for v in wrong
        }:
            accepted = f"1 to {len(devices)} here: a rank takes a device ({', '.join(devices)})"
            wrong.append(Violation("spec.train.parallelism.ranks", str(wanted.train.parallelism.ranks), accepted))
        if missing and (wrong or len(missing) > 1):
            fields = {"templates": "template", "models": "spec.train.model", "datasets": "spec.train.dataset"}
            wrong += [Violation(fields[f.resource.split("/")[0]], show(f.resource), f.message) for f in missing]
        if wrong:
            raise invalid(wrong)
        if missing:
            raise missing[0]
        assert dataset is not None  # else it would be missing, or its name wrong
        return Settled(template.name, resolved.spec, dataset)

    def estimate(
        self,
        request: trainer_pb2.EstimateJobRequest,
        schemas: objective.Schemas | None,
        before: Sequence[trainer_pb2.Job],
    ) -> trainer_pb2.EstimateJobResponse:
        """What a job would take, judged by those that went before it; loads nothing."""
        wrong = list(spec.unknown(request, "request"))
        settled = self.settle(request.template, request.spec, wrong, schemas)
        train = settled.spec.train
        sealed = self._shelf.open("models", train.model.removeprefix("models/"))
        told = facts.from_manifest(facts.ModelFacts, sealed.manifest)
        tensors = read_model_headers(sealed.payload)
        try:
            made = shape.shape_of(
                json.loads((sealed.payload / "config.json").read_text()),
                {name: tensor.shape for name, tensor in tensors.items()},
                told.target_modules,
                max(tensor.width for tensor in tensors.values()),
            )
        except ValueError as error:
            raise rejected(train.model, str(error)) from None
        device = self._host.device
        run = estimate.run_of(train, device)
        if not run.tokens:
            run = dataclasses.replace(run, tokens=estimate.largest(made, run, train.memory.budget_bytes) or run.length)
        rows = sum(settled.dataset.rows.values())
        answer = estimate.to_proto(estimate.estimate(made, run, rows, train.checkpoints.keep_last))
        judged = history.judge(train, made.weights, rows * train.data.max_length_tokens, before)
        answer.correction, answer.judged_from = judged.correction, judged.judged_from
        answer.memory_bytes = round(answer.memory_bytes * judged.correction)
        answer.needed_bytes = round(answer.needed_bytes * judged.correction)
        if judged.seconds is not None:
            answer.seconds = judged.seconds
        answer.device = device
        answer.spec.CopyFrom(settled.spec)
        return answer

    @staticmethod
    def _look_up(look: Callable[[], T], missing: list[Fault]) -> T | None:
        try:
            return look()
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND:
                raise
            missing.append(fault)
            return None

    def _model(self, name: str) -> spec.ModelKnown:
        sealed = self._shelf.open("models", name.removeprefix("models/"), field="spec.train.model")
        told = facts.from_manifest(facts.ModelFacts, sealed.manifest)
        return spec.ModelKnown(sealed.digest, told.context_tokens, told.target_modules, told.architecture)

    def _dataset(self, name: str) -> spec.DatasetKnown:
        sealed = self._shelf.open("datasets", name.removeprefix("datasets/"), field="spec.train.dataset")
        rows = {s: len(shards.ShardReader(sealed.payload, s)) for s in shards.splits_in(sealed.payload)}
        return spec.DatasetKnown(sealed.digest, rows)
