"""Adapters as the contract tells them, and what may come in as one.

Law of this room: pure. Sizes and names are decided here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from qlorad.v1 import artifacts_pb2, registry_pb2
from services.common import generation, names
from services.common.errors import Violation, corrupt, invalid, invalid_field, rejected, show, too_large
from services.common.facts import AdapterFacts, from_manifest
from services.registry.folder import CODE, PICKLES

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
FILES: Final = (CONFIG, WEIGHTS)
CONFIG_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 1 << 20
IMPORT_MAKER: Final = "import.adapter"
"""Provenance of an import. The dot keeps it apart from job ids."""


@dataclass(slots=True)
class Intake:
    """What has come in of an adapter so far; every step may refuse. Not frozen: it counts."""

    name: str
    limit_bytes: int
    sizes: dict[str, int] = field(default_factory=dict)
    current: str = ""

    def begin(self, path: str) -> str:
        """The file that begins now."""
        if path.lower().endswith(PICKLES):
            raise rejected(self.name, f"{show(path)} may be pickle; accepted: {WEIGHTS}")
        if path.lower().endswith(CODE):
            raise rejected(self.name, f"{show(path)} is code; accepted: {', '.join(FILES)}")
        if path not in FILES:
            raise invalid_field("path", path, " or ".join(FILES))
        if path in self.sizes:
            raise invalid_field("path", path, "each file once")
        self.sizes[path] = 0
        self.current = path
        return path

    def grow(self, count: int) -> None:
        """So many bytes more of the current file."""
        if not self.current:
            raise invalid_field("data", f"{count} bytes", "data after the path of its file")
        if count > PIECE_BYTES:
            raise too_large("data", count, PIECE_BYTES, "bytes a message")
        self.sizes[self.current] += count
        limit = CONFIG_BYTES if self.current == CONFIG else self.limit_bytes
        if self.sizes[self.current] > limit:
            raise too_large(self.current, self.sizes[self.current], limit, "bytes")

    def end(self) -> None:
        """All files must be there."""
        wrong = [Violation("path", f"no {f}", f"both of {', '.join(FILES)}") for f in FILES if f not in self.sizes]
        if wrong:
            raise invalid(wrong)


def check_header(header: registry_pb2.ImportAdapterHeader) -> None:
    """INVALID_ARGUMENT with all violations of a header."""
    wrong = names.check_request_id(header.request_id) + names.check_id("adapter_id", header.adapter_id)
    wrong += names.check_name("base_model", header.base_model, "models")
    if wrong:
        raise invalid(wrong)


def check_set_alias(request: registry_pb2.SetAdapterAliasRequest) -> tuple[str, str, int | None]:
    """Alias, target and expected generation; INVALID_ARGUMENT with all violations."""
    wrong = names.check_request_id(request.request_id)
    alias = request.alias.removeprefix("adapters/")
    if alias == request.alias or not names.is_alias(alias):
        wrong.append(Violation("alias", show(request.alias), f"'adapters/ID' with {names.ALIAS_RULE}"))
    wrong += names.check_name("adapter", request.adapter, "adapters")
    expected = request.expected_generation if request.HasField("expected_generation") else None
    if expected is not None and expected < 0:
        wrong.append(Violation("expected_generation", show(expected), "0 (must not exist yet) or more, or absent"))
    if wrong:
        raise invalid(wrong)
    return alias, request.adapter.removeprefix("adapters/"), expected


def describe(
    manifest: artifacts_pb2.Manifest,
    aliases: Iterable[artifacts_pb2.Alias],
    provenance: Mapping[str, object],
    asked: str = "",
) -> registry_pb2.Adapter:
    """A sealed adapter as the contract tells it, under the alias that was asked for if it has it."""
    facts = from_manifest(AdapterFacts, manifest)
    pointing = [a for a in aliases if a.digest == manifest.digest]
    told = [a.name for a in pointing]
    name = f"adapters/{asked}" if f"adapters/{asked}" in told else (told or [f"adapters/{manifest.digest}"])[0]
    return registry_pb2.Adapter(
        name=name,
        digest=manifest.digest,
        lineage=manifest.lineage,
        rank=facts.rank,
        alpha=facts.alpha,
        target_modules=facts.target_modules,
        size_bytes=sum(f.size_bytes for f in manifest.files),
        parameters=facts.parameters,
        create_time=manifest.create_time,
        jobs=sorted(f"jobs/{maker}" for maker in provenance if names.JOB.fullmatch(maker)),
        aliases=pointing,
        rslora=facts.rslora,
        dora=facts.dora,
        generation=generation.from_plain(facts.generation, lambda why: corrupt(manifest.digest, why)),
    )
