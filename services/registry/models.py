"""Models as the contract tells them, and what a call for one means.

Law of this room: pure. The shelf is the truth about READY models; rows tell of
the others.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlorad.v1 import artifacts_pb2, registry_pb2
from services.common import names
from services.common.errors import Fault, Violation, already_exists, invalid, show, wrong_state
from services.common.facts import ModelFacts, from_manifest

PULLING: Final = registry_pb2.MODEL_STATE_PULLING
VERIFYING: Final = registry_pb2.MODEL_STATE_VERIFYING
READY: Final = registry_pb2.MODEL_STATE_READY
FAILED: Final = registry_pb2.MODEL_STATE_FAILED

STARTERS: Final[Mapping[int, str]] = {
    registry_pb2.STARTER_SIZE_TEST: "test",
    registry_pb2.STARTER_SIZE_DEMO: "demo",
}
# What a worker does before the bytes are there; everything after is verifying.
_PULLING_STAGES: Final = frozenset({"wait", "load", "corpus", "tokenizer", "train", "write", "copy"})


@dataclass(frozen=True, slots=True)
class Source:
    """What a model is made from; two calls for one alias agree if their sources do."""

    text: str
    """As "starter:test" or "import:/models/x"."""

    @property
    def size(self) -> str:
        """The starter's size; empty for anything else."""
        kind, _, rest = self.text.partition(":")
        return rest if kind == "starter" else ""

    @property
    def maker(self) -> str:
        """The name of its provenance file."""
        kind, _, rest = self.text.partition(":")
        return f"{kind}.{rest}" if kind == "starter" else f"{kind}.{hashlib.sha256(rest.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Row:
    """A model that is not READY, as SQLite remembers it."""

    alias: str
    source: str
    state: registry_pb2.ModelState.ValueType
    error: str
    begun_seconds: float

    def model(self) -> registry_pb2.Model:
        return registry_pb2.Model(name=f"models/{self.alias}", state=self.state, error=self.error)


def check_starter(request: registry_pb2.MakeStarterModelRequest) -> tuple[Source, str]:
    """Source and alias of a request for a starter; INVALID_ARGUMENT with all violations."""
    wrong = names.check_request_id(request.request_id)
    if request.size not in STARTERS:
        wrong.append(Violation("size", show(int(request.size)), "STARTER_SIZE_TEST or STARTER_SIZE_DEMO"))
    if request.model_id:
        wrong += names.check_id("model_id", request.model_id)
    if wrong:
        raise invalid(wrong)
    size = STARTERS[request.size]
    return Source(f"starter:{size}"), request.model_id or f"starter-{size}"


def check_import(request: registry_pb2.ImportModelRequest) -> tuple[pathlib.Path, str]:
    """Path and alias of an import; INVALID_ARGUMENT with all violations."""
    wrong = names.check_request_id(request.request_id) + names.check_id("model_id", request.model_id)
    path = request.path
    if not path.startswith("/") or "\0" in path or len(path) > 4096:
        wrong.append(Violation("path", show(path), "an absolute path of a folder on the daemon's host"))
    if wrong:
        raise invalid(wrong)
    return pathlib.Path(path), request.model_id


def import_source(folder: pathlib.Path, stamps: Iterable[tuple[str, int, int]]) -> Source:
    """The source of an import; `stamps` are name, size and time of each file, so that a changed folder is another."""
    seen = hashlib.sha256(repr(sorted(stamps)).encode()).hexdigest()[:12]
    return Source(f"import:{folder}@{seen}")


def state_of(stage: str) -> registry_pb2.ModelState.ValueType:
    """The state that a worker's stage means."""
    return PULLING if stage in _PULLING_STAGES else VERIFYING


def same_or_taken(alias: str, source: Source, makers: Iterable[str]) -> None:
    """ALREADY_EXISTS if the alias names a model that was made from something else."""
    if source.maker not in set(makers):
        raise already_exists(f"models/{alias}", f"it was not made from {source.text!r}; accepted: another model_id")


def deletable(row: Row) -> None:
    """FAILED_PRECONDITION if the model is being made."""
    if row.state in (PULLING, VERIFYING):
        state = registry_pb2.ModelState.Name(row.state).removeprefix("MODEL_STATE_")
        raise wrong_state(f"models/{row.alias}", state, ("READY", "FAILED"))


def describe(manifest: artifacts_pb2.Manifest, alias: str) -> registry_pb2.Model:
    """A sealed model as the contract tells it."""
    facts = from_manifest(ModelFacts, manifest)
    return registry_pb2.Model(
        name=f"models/{alias or manifest.digest}",
        state=READY,
        digest=manifest.digest,
        architecture=facts.architecture,
        family=facts.family,
        parameters=facts.parameters,
        size_bytes=sum(f.size_bytes for f in manifest.files),
        nf4_bytes=facts.nf4_bytes,
        context_tokens=facts.context_tokens,
        vocabulary=facts.vocabulary,
        target_modules=facts.target_modules,
        tokenizer_digest=facts.tokenizer_digest,
        template_digest=facts.template_digest,
        template_has_generation_marks=facts.template_has_generation_marks,
        create_time=manifest.create_time,
    )


def story_of(source: Source, told: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a model."""
    return {"source": source.text, **told}


def interrupted(alias: str) -> str:
    """Why a model FAILED whose daemon ended."""
    return f"the daemon ended while models/{alias} was being made; call again"


def why_failed(error: Exception) -> str:
    """Why a model FAILED, for those who ask later."""
    return error.message if isinstance(error, Fault) else "internal error; see the daemon's log"
