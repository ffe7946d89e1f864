"""What manifests tell about their content, as frozen dataclasses.

Law of this room: pure. Whoever seals writes these; whoever reads never guesses.
A Struct holds every number as a float, so reading turns them back.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from qlorad.v1 import artifacts_pb2
from services.common import artifacts
from services.common.errors import corrupt

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """A base model."""

    architecture: str
    """From config.json, as in "LlamaForCausalLM"."""
    family: str
    """From config.json, as in "llama"."""
    parameters: int
    nf4_bytes: int
    context_tokens: int
    vocabulary: int
    target_modules: tuple[str, ...]
    """Short names of the linear modules LoRA can target (lm_head and embeddings left out)."""
    tokenizer_digest: str
    """sha256 of tokenizer.json, as "sha256:…"."""
    template_digest: str
    """sha256 of the chat template's text, as "sha256:…"; empty if there is none."""
    template_has_generation_marks: bool
    template_date: str
    """The date that strftime_now gives in templates, ISO, fixed at sealing."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation: generation_config.json, else config.json, else the tokenizer's."""


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    parameters: int
    golden: tuple[Mapping[str, Any], ...]
    """Golden renderings, from common/prompt/golden."""
    prompt_format: str = "PROMPT_FORMAT_UNSPECIFIED"
    """Name of the enum value; adapters of before had none but the model's own template."""
    rslora: bool = False
    """Whether the update is scaled by alpha / sqrt(rank)."""
    dora: bool = False
    """Whether each output's magnitude is learnt apart from its direction."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How it is served where a request says nothing: qlorad.v1.GenerationOptions, as common/generation keeps them."""


@dataclasses.dataclass(frozen=True, slots=True)
class DatasetFacts:
    """A dataset."""

    format: str
    """Name of the enum value, as in "ROW_FORMAT_CHAT"."""
    stats: Mapping[str, Any]
    """qlorad.v1.DatasetStats as protojson with the proto's field names."""
    split: Mapping[str, Any]
    """qlorad.v1.Split, likewise."""
    source_sha256: tuple[str, ...]
    """Of the files it was made of, in order."""
    lineage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """qlorad.v1.DatasetLineage, likewise."""


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerFacts:
    """A ledger."""

    dataset_digest: str
    tokenizer_digest: str
    template_digest: str
    max_length_tokens: int
    over_length: str
    """Name of the enum value, as in "OVER_LENGTH_ERROR"."""
    splits: tuple[Mapping[str, Any], ...]
    """One qlorad.v1.LedgerSplit each, as a mapping with the proto's field names."""
    prompt_format: str = "PROMPT_FORMAT_UNSPECIFIED"
    """Name of the enum value."""


def to_facts(facts: Any) -> dict[str, Any]:
    """A facts dataclass as a mapping for a manifest."""
    plain: dict[str, Any] = {}
    for f in dataclasses.fields(facts):
        value = getattr(facts, f.name)
        plain[f.name] = [dict(v) if isinstance(v, Mapping) else v for v in value] if isinstance(value, tuple) else value
    return plain


def from_manifest(kind: type[T], manifest: artifacts_pb2.Manifest) -> T:
    """The facts of a manifest; DATA_LOSS naming the fact that is missing."""
    told = artifacts.facts_of(manifest)
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    optional = {f.name for f in dataclasses.fields(kind) if not _is_required(f)}  # type: ignore[arg-type]
    for name, hint in hints.items():
        if name not in told and name in optional:
            continue  # sealed before there was such a fact
        if name not in told:
            raise corrupt(manifest.digest, f"its manifest lacks the fact {name!r}")
        values[name] = _turn(hint, told[name])
    return kind(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _turn(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_turn(inner, v) for v in value)
    return hint(value) if hint in (int, float, str, bool) else value
