"""What a job is asked to do: templates, overrides, and everything that can be wrong with them.

Law of this room: pure. Presence decides: what a caller set replaces the
template's value (lists whole), what he left out stays. Inherited values bend to
the model and the dataset where they must; given values are never bent, they are
refused with the nearest that would do. All violations are found at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, unknown_fields
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from qlorad.v1 import datasets_pb2, messages_pb2, trainer_pb2
from services.common import generation, names
from services.common.errors import Violation, show
from services.trainer import agreement, objective
from services.trainer.agreement import within

ALL_LINEAR = "all-linear"
MAX_RANKS = 64
DIVISIBLE = (trainer_pb2.OPTIMIZER_KIND_ADAMW, trainer_pb2.OPTIMIZER_KIND_SGD)
"""Optimisers whose state is one number for each weight, so that it can be divided anywhere and put together again."""
LABEL_KEY_RULE = "at most 32 labels; keys 1 to 63 of [a-z0-9_.-], values at most 255 characters"


@dataclass(frozen=True, slots=True)
class ModelKnown:
    """What the shelf says of the model."""

    digest: str
    context_tokens: int
    target_modules: tuple[str, ...]
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class DatasetKnown:
    """What the shelf says of the dataset."""

    digest: str
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Host:
    """Where jobs of this daemon run."""

    device: str
    cores: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A merged spec with names turned to digests, and what is wrong with it."""

    spec: trainer_pb2.JobSpec
    violations: tuple[Violation, ...]


def read_templates(trees: Mapping[str, object]) -> dict[str, trainer_pb2.JobTemplate]:
    """Templates by name, each with the values of the one that it extends; ValueError says what is wrong."""
    own = {name: read_template(name, tree) for name, tree in trees.items()}
    return {name: _extended(template, own, (name,)) for name, template in own.items()}


def _extended(
    template: trainer_pb2.JobTemplate, own: Mapping[str, trainer_pb2.JobTemplate], way: tuple[str, ...]
) -> trainer_pb2.JobTemplate:
    if not template.extends:
        return template
    if template.extends not in own:
        raise ValueError(f"template {template.name}: extends {template.extends!r}, of which there is none")
    if template.extends in way:
        raise ValueError(f"template {template.name}: extends itself: {' -> '.join((*way, template.extends))}")
    whole = trainer_pb2.JobTemplate()
    whole.CopyFrom(template)
    whole.spec.CopyFrom(merged(_extended(own[template.extends], own, (*way, template.extends)), template.spec))
    return whole


def read_template(name: str, tree: object) -> trainer_pb2.JobTemplate:
    """A template from the plain values of its file alone; ValueError says what is wrong."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"template {name}: must be a mapping with description and spec")
    template = trainer_pb2.JobTemplate(name=name)
    try:
        json_format.ParseDict(dict(tree), template)
    except json_format.ParseError as e:
        raise ValueError(f"template {name}: {e}") from None
    template.name = name
    return template


def merge(target: Message, override: Message) -> None:
    """Lays what is set in `override` over `target`; lists are replaced."""
    for field, value in override.ListFields():
        if field.is_repeated:
            target.ClearField(field.name)
            getattr(target, field.name).MergeFrom(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(target, field.name).SetInParent()
            merge(getattr(target, field.name), value)
        else:
            setattr(target, field.name, value)


def merged(template: trainer_pb2.JobTemplate, override: trainer_pb2.JobSpec) -> trainer_pb2.JobSpec:
    """The template with the caller's differences."""
    spec = trainer_pb2.JobSpec()
    spec.CopyFrom(template.spec)
    merge(spec, override)
    return spec


def given_paths(message: Message, prefix: str = "spec") -> frozenset[str]:
    """Paths of every field that the caller set."""
    found: set[str] = set()
    for field, value in message.ListFields():
        path = f"{prefix}.{field.name}"
        found.add(path)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            found |= given_paths(value, path)
    return frozenset(found)


def unknown(message: Message, prefix: str) -> Iterator[Violation]:
    """Violations for fields that this version does not know."""
    strangers: Any = unknown_fields.UnknownFieldSet(message)
    for stranger in strangers:
        accepted = ", ".join(message.DESCRIPTOR.fields_by_name)
        yield Violation(prefix, f"unknown field number {stranger.field_number}", f"the fields {accepted}")
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            yield from unknown(value, f"{prefix}.{field.name}")


def names_wanted(spec: trainer_pb2.JobSpec) -> list[Violation]:
    """Violations of the names that must be looked up before anything else."""
    train = spec.train
    wrong = names.check_name("spec.train.model", train.model, "models")
    wrong += names.check_name("spec.train.dataset", train.dataset, "datasets")
    return wrong


def check_request(request: trainer_pb2.CreateJobRequest) -> list[Violation]:
    """Violations of everything but the spec."""
    wrong: list[Violation] = []
    if request.request_id or not request.validate_only:
        wrong += names.check_request_id(request.request_id)
    if request.job_id:
        wrong += names.check_id("job_id", request.job_id, names.JOB, names.JOB_RULE)
    if not -100 <= request.priority <= 100:
        wrong.append(Violation("priority", show(request.priority), "-100 to 100"))
    if len(request.labels) > 32:
        wrong.append(Violation("labels", f"{len(request.labels)} labels", LABEL_KEY_RULE))
    for key, value in sorted(request.labels.items()):
        good = 1 <= len(key) <= 63 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789_.-" for c in key)
        if not good or len(value) > 255:
            wrong.append(Violation(f"labels[{show(key)}]", show(value), LABEL_KEY_RULE))
    if len(request.experiment) > 255:
        wrong.append(Violation("experiment", f"{len(request.experiment)} characters", "at most 255 characters"))
    return wrong + list(unknown(request, "request"))


def resolve(
    template: trainer_pb2.JobTemplate,
    override: trainer_pb2.JobSpec,
    model: ModelKnown | None,
    dataset: DatasetKnown | None,
    host: Host,
    objectives: objective.Schemas | None = None,
) -> Resolved:
    """The spec that will run, and ALL that is wrong with it.

    A model or dataset of None could not be looked up: what depends on it is not
    judged, and the caller of this function says so. Schemas of the objectives
    are there where objective.needs_look says that they are needed.
    """
    spec = merged(template, override)
    train = spec.train
    given = given_paths(override)
    if model is not None:
        train.model = f"models/{model.digest}"
    if dataset is not None:
        train.dataset = f"datasets/{dataset.digest}"
    _bend(train, given, model, host)
    architecture = model.architecture if model is not None else ""
    objective.bend(train, given, architecture)
    wrong = [*_plain_bounds(train), *_enums(train)]
    context = model.context_tokens if model is not None else 0
    wrong += generation.check(train.generation, context, "spec.train.generation")
    wrong += _together(train, model, dataset, host)
    wrong += objective.check(train, architecture, objectives)
    if train.adapter:
        rest = train.adapter.removeprefix("adapters/")
        if rest == train.adapter or not names.is_alias(rest):
            wrong.append(
                Violation("spec.train.adapter", show(train.adapter), f"'adapters/ID'; ID is {names.ALIAS_RULE}")
            )
    order = {path: n for n, path in enumerate(_paths(train.DESCRIPTOR, "spec.train"))}
    return Resolved(spec, tuple(sorted(wrong, key=lambda v: order.get(v.field, -1))))


def _bend(train: trainer_pb2.TrainSpec, given: frozenset[str], model: ModelKnown | None, host: Host) -> None:
    """Fits inherited values to what is given and to the model."""
    data = train.data
    if model is not None:
        if "spec.train.data.max_length_tokens" not in given:
            data.max_length_tokens = min(data.max_length_tokens, model.context_tokens)
        if list(train.lora.target_modules.names) == [ALL_LINEAR]:
            train.lora.target_modules.names[:] = sorted(model.target_modules)
    if data.micro_batch_tokens and "spec.train.data.micro_batch_tokens" not in given:
        data.micro_batch_tokens = max(data.micro_batch_tokens, data.max_length_tokens)
    if data.step_tokens and "spec.train.data.accumulation" not in given:
        data.accumulation = 0
    if data.accumulation and "spec.train.data.accumulation" in given and "spec.train.data.step_tokens" not in given:
        data.step_tokens = 0
    if data.packing and "spec.train.data.length_grouping" not in given:
        data.length_grouping = False
    flat = train.schedule.kind == trainer_pb2.SCHEDULE_KIND_CONSTANT
    if flat and "spec.train.schedule.floor_share" not in given:
        train.schedule.floor_share = 0.0
    quantization = train.quantization
    if quantization.method != trainer_pb2.QUANTIZATION_METHOD_NF4:
        if "spec.train.quantization.double_quantization" not in given:
            quantization.double_quantization = False
    if train.parallelism.ranks == 1 and "spec.train.parallelism.zero_stage" not in given:
        train.parallelism.zero_stage = 0
    if train.parallelism.ranks == 1 and "spec.train.parallelism.offload" not in given:
        train.parallelism.offload = trainer_pb2.OFFLOAD_UNSPECIFIED
    if train.parallelism.ranks > 1 and "spec.train.parallelism.zero_stage" not in given:
        train.parallelism.zero_stage = train.parallelism.zero_stage or 2
    if train.threads == 0:
        train.threads = host.cores


@dataclass(frozen=True, slots=True)
class _Bound:
    """A field that is judged by itself."""

    path: str
    good: Callable[[Any], bool]
    accepted: str


_BOUNDS = (
    _Bound("lora.rank", within(1, 512), "1 to 512"),
    _Bound("lora.alpha", within(0, 65536, above=True), "above 0, at most 65536"),
    _Bound("lora.dropout", within(0, 1, below=True), "from 0 to below 1"),
    _Bound("data.step_tokens", within(0, 1 << 30), f"0 (data.accumulation decides) to {1 << 30}"),
    _Bound("optimizer.learning_rate", within(0, 1, above=True), "above 0, at most 1"),
    _Bound("optimizer.weight_decay", within(0, 1), "from 0 to 1"),
    _Bound("optimizer.beta1", within(0, 1, below=True), "from 0 to below 1"),
    _Bound("optimizer.beta2", within(0, 1, below=True), "from 0 to below 1"),
    _Bound("optimizer.momentum", within(0, 1, below=True), "from 0 to below 1"),
    _Bound("optimizer.max_grad_norm", within(0, 1e9), "0 (not cut) or above"),
    _Bound("schedule.max_steps", within(0, 10_000_000), "0 to 10000000"),
    _Bound("schedule.warmup_share", within(0, 1, below=True), "from 0 to below 1"),
    _Bound("schedule.floor_share", within(0, 1), "from 0 to 1"),
    _Bound("evaluation.patience", within(0, 1_000_000), "0 (does not end early) to 1000000"),
    _Bound("evaluation.min_improvement", within(0, 1e9), "0 or above"),
    _Bound("evaluation.every_steps", within(0, 10_000_000), "0 to 10000000"),
    _Bound("checkpoints.every_steps", within(0, 10_000_000), "0 to 10000000"),
    _Bound("checkpoints.keep_last", within(1, 1000), "1 to 1000"),
    _Bound("checkpoints.keep_best", within(0, 1000), "0 to 1000"),
    _Bound("checkpoints.keep_every_steps", within(0, 10_000_000), "0 to 10000000"),
    _Bound("guards.spike_factor", within(1, 1e6, above=True), "above 1, at most 1000000"),
    _Bound("guards.max_skips", within(1, 1_000_000), "1 to 1000000"),
    _Bound("parallelism.ranks", within(1, MAX_RANKS), f"1 to {MAX_RANKS}"),
    _Bound("limits.max_attempts", within(1, 1000), "1 to 1000"),
)


def _plain_bounds(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    for bound in _BOUNDS:
        group, field = bound.path.split(".")
        value = getattr(getattr(train, group), field)
        if not bound.good(value):
            yield Violation(f"spec.train.{bound.path}", show(value), bound.accepted)


def _enums(train: trainer_pb2.TrainSpec) -> Iterator[Violation]:
    for group, field, enum in (
        ("quantization", "method", trainer_pb2.QuantizationMethod),
        ("quantization", "compute_type", trainer_pb2.ComputeType),
        ("data", "over_length", datasets_pb2.OverLength),
        ("optimizer", "kind", trainer_pb2.OptimizerKind),
        ("schedule", "kind", trainer_pb2.ScheduleKind),
        ("guards", "not_finite", trainer_pb2.TroublePolicy),
        ("guards", "spike", trainer_pb2.TroublePolicy),
        ("guards", "all_masked", trainer_pb2.TroublePolicy),
    ):
        value = getattr(getattr(train, group), field)
        never = trainer_pb2.TROUBLE_POLICY_CONTINUE if field in ("not_finite", "all_masked") else 0
        accepted = [name for name, number in enum.items() if number not in (0, never)]
        if value not in enum.values() or value in (0, never):
            yield Violation(f"spec.train.{group}.{field}", show(value), ", ".join(accepted))
    if train.data.prompt_format not in messages_pb2.PromptFormat.values():
        accepted = [name for name, number in messages_pb2.PromptFormat.items() if number]
        told = f"none (the model's own template), {', '.join(accepted)}"
        yield Violation("spec.train.data.prompt_format", show(train.data.prompt_format), told)


def _together(
    train: trainer_pb2.TrainSpec, model: ModelKnown | None, dataset: DatasetKnown | None, host: Host
) -> Iterator[Violation]:
    """Violations of values that must fit one another, the model, the dataset or the host."""
    data = train.data
    context = model.context_tokens if model is not None else 1 << 30
    top = f"8 to {context} (the model's context)" if model is not None else "8 or more"
    if not 8 <= data.max_length_tokens <= context:
        yield Violation("spec.train.data.max_length_tokens", show(data.max_length_tokens), top)
    if data.micro_batch_tokens and not data.max_length_tokens <= data.micro_batch_tokens <= 1 << 24:
        accepted = f"0 (chosen by measuring), or {data.max_length_tokens} (max_length_tokens) to {1 << 24}"
        yield Violation("spec.train.data.micro_batch_tokens", show(data.micro_batch_tokens), accepted)
    if train.optimizer.momentum and train.optimizer.kind != trainer_pb2.OPTIMIZER_KIND_SGD:
        accepted = "0 where kind is not OPTIMIZER_KIND_SGD (beta1 is AdamW's momentum)"
        yield Violation("spec.train.optimizer.momentum", show(train.optimizer.momentum), accepted)
    yield from _targets(train, model)
    yield from agreement.violations(train)
    yield from of_ranks(train, host)
    if train.threads > host.cores:
        yield Violation("spec.train.threads", show(train.threads), f"0 (all) to {host.cores} (cores of this host)")
    if train.quantization.double_quantization and train.quantization.method != trainer_pb2.QUANTIZATION_METHOD_NF4:
        accepted = "False where method is not QUANTIZATION_METHOD_NF4"
        yield Violation("spec.train.quantization.double_quantization", "True", accepted)
    if dataset is not None:
        if not dataset.rows.get("train", 0):
            splits = ", ".join(f"{s} {n}" for s, n in sorted(dataset.rows.items())) or "no rows at all"
            yield Violation("spec.train.dataset", f"{splits} rows", "a dataset with rows in its train split")
        if train.evaluation.every_steps and not dataset.rows.get("validation", 0):
            yield Violation(
                "spec.train.evaluation.every_steps",
                show(train.evaluation.every_steps),
                "0: the dataset has no validation split",
            )


def _targets(train: trainer_pb2.TrainSpec, model: ModelKnown | None) -> Iterator[Violation]:
    field = "spec.train.lora.target_modules.names"
    wanted = list(train.lora.target_modules.names)
    if not wanted:
        yield Violation(field, "none", f"names of linear modules, or '{ALL_LINEAR}'")
    twice = sorted({n for n in wanted if wanted.count(n) > 1})
    if twice:
        yield Violation(field, ", ".join(map(show, twice)) + " twice", "each name once")
    if model is None:
        return
    for name in dict.fromkeys(wanted):
        if name in model.target_modules:
            continue
        near = difflib.get_close_matches(name, model.target_modules, n=1)
        accepted = f"'{ALL_LINEAR}' alone, or of {', '.join(sorted(model.target_modules))}"
        yield Violation(field, show(name), accepted + (f"; did you mean {near[0]!r}?" if near else ""))


def of_ranks(train: trainer_pb2.TrainSpec, host: Host) -> Iterator[Violation]:
    """Violations of what several processes, or one alone, cannot do."""
    field, p = "spec.train.parallelism", train.parallelism
    offload = trainer_pb2.Offload
    if p.offload not in offload.values():
        yield Violation(f"{field}.offload", show(p.offload), ", ".join(offload.keys()))
        return
    name = offload.Name(p.offload)
    if p.ranks <= 1:
        if p.zero_stage:
            yield Violation(f"{field}.zero_stage", show(p.zero_stage), "0 where ranks is 1; or ranks above 1")
        if p.offload:
            yield Violation(f"{field}.offload", name, "OFFLOAD_UNSPECIFIED where ranks is 1; or ranks above 1")
        return
    if host.device == "mps":
        yield Violation(f"{field}.ranks", show(p.ranks), "1 on mps: DeepSpeed does not work there")
    if p.zero_stage not in (1, 2, 3):
        yield Violation(f"{field}.zero_stage", show(p.zero_stage), "1, 2 or 3 where ranks is above 1")
    elif p.offload == trainer_pb2.OFFLOAD_ALL and p.zero_stage != 3:
        accepted = "OFFLOAD_OPTIMIZER, or zero_stage 3: only that divides the weights"
        yield Violation(f"{field}.offload", name, accepted)
    kind = train.optimizer.kind
    if kind in trainer_pb2.OptimizerKind.values() and kind and kind not in DIVISIBLE:
        nearest = "OPTIMIZER_KIND_ADAMW with parallelism.offload OFFLOAD_OPTIMIZER"
        accepted = f"{nearest}, or ranks 1: its state lies in blocks, which cannot be divided anew among ranks"
        yield Violation("spec.train.optimizer.kind", trainer_pb2.OptimizerKind.Name(kind), accepted)


def _paths(descriptor: Any, prefix: str) -> Iterable[str]:
    for field in descriptor.fields:
        path = f"{prefix}.{field.name}"
        yield path
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            yield from _paths(field.message_type, path)
