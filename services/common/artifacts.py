"""Digests and manifests: what an artifact is.

Law of this room: a digest is a function of the payload bytes and, for an
adapter, of what it was trained on; never of times, paths or makers.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf import json_format, struct_pb2

from qlorad.v1 import artifacts_pb2
from services.common.errors import corrupt, show

FORMAT = 1
MANIFEST = "manifest.json"
PAYLOAD = "payload"
CHUNK = 1 << 20

Kind = artifacts_pb2.ArtifactKind

FOLDERS: Mapping[int, str] = {
    artifacts_pb2.ARTIFACT_KIND_MODEL: "models",
    artifacts_pb2.ARTIFACT_KIND_DATASET: "datasets",
    artifacts_pb2.ARTIFACT_KIND_LEDGER: "datasets",
    artifacts_pb2.ARTIFACT_KIND_ADAPTER: "adapters",
    artifacts_pb2.ARTIFACT_KIND_CHECKPOINT: "checkpoints",
}


def sha256_file(path: pathlib.Path) -> str:
    """Lower-case hex sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def list_payload(folder: pathlib.Path) -> list[artifacts_pb2.FileEntry]:
    """Entries of every regular file below a folder, sorted by path.

    Refuses links and anything that is not a plain file.
    """
    paths = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise corrupt(path.name, "is a link or a special file; only plain files are sealed")
        if not path.name.isprintable():
            raise corrupt(show(path.name), "has a name that cannot be printed; a manifest line must be one line")
        if path.is_file():
            paths.append(path)
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        digests = list(readers.map(sha256_file, paths))
    return [
        artifacts_pb2.FileEntry(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digests, strict=True)
    ]


def digest_of(
    kind: artifacts_pb2.ArtifactKind.ValueType,
    files: Iterable[artifacts_pb2.FileEntry],
    lineage: artifacts_pb2.Lineage | None = None,
) -> str:
    """The digest, as artifacts.proto tells it."""
    h = hashlib.sha256(f"qlorad {Kind.Name(kind).removeprefix('ARTIFACT_KIND_').lower()} {FORMAT}\n".encode())
    if lineage is not None and kind == artifacts_pb2.ARTIFACT_KIND_ADAPTER:
        h.update(f"base {lineage.base_digest}\n".encode())
        h.update(f"tokenizer {lineage.tokenizer_digest}\n".encode())
        h.update(f"template {lineage.template_digest}\n".encode())
    for f in sorted(files, key=lambda f: f.path):
        h.update(f"{f.sha256}  {f.size_bytes}  {f.path}\n".encode())
    return "sha256:" + h.hexdigest()


def facts_of(manifest: artifacts_pb2.Manifest) -> dict[str, Any]:
    """The facts as plain values (numbers are floats, as in every Struct)."""
    plain = json_format.MessageToDict(manifest.facts)
    assert isinstance(plain, dict)
    return plain


def make_manifest(
    kind: artifacts_pb2.ArtifactKind.ValueType,
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    lineage: artifacts_pb2.Lineage | None = None,
) -> artifacts_pb2.Manifest:
    """The manifest of a payload folder; the time of sealing is left to the shelf."""
    files = list_payload(folder)
    struct = struct_pb2.Struct()
    struct.update(dict(facts))
    manifest = artifacts_pb2.Manifest(format=FORMAT, kind=kind, files=files, facts=struct)
    if lineage is not None:
        manifest.lineage.CopyFrom(lineage)
    manifest.digest = digest_of(kind, files, lineage)
    return manifest


def write_manifest(manifest: artifacts_pb2.Manifest) -> bytes:
    """The manifest as it lies on disk."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, indent=1, sort_keys=True)
    return (text + "\n").encode()


def read_manifest(path: pathlib.Path) -> artifacts_pb2.Manifest:
    """A manifest from disk; DATA_LOSS if it is not one or its digest does not follow."""
    manifest = artifacts_pb2.Manifest()
    try:
        json_format.Parse(path.read_bytes(), manifest)
    except (json_format.ParseError, UnicodeDecodeError) as e:
        raise corrupt(path.parent.name, f"manifest cannot be read: {e}") from None
    if manifest.format != FORMAT:
        raise corrupt(path.parent.name, f"manifest format {manifest.format}; accepted: {FORMAT}")
    lineage = manifest.lineage if manifest.HasField("lineage") else None
    if digest_of(manifest.kind, manifest.files, lineage) != manifest.digest:
        raise corrupt(path.parent.name, "manifest does not match its own digest")
    return manifest


def verify_payload(manifest: artifacts_pb2.Manifest, folder: pathlib.Path) -> None:
    """DATA_LOSS naming the first file that is missing, foreign or different."""
    there = {f.path: f for f in list_payload(folder)}
    for f in manifest.files:
        found = there.pop(f.path, None)
        if found is None:
            raise corrupt(manifest.digest, f"file {f.path!r} is missing")
        if found.size_bytes != f.size_bytes or found.sha256 != f.sha256:
            raise corrupt(manifest.digest, f"file {f.path!r} differs from the manifest")
    if there:
        raise corrupt(manifest.digest, f"foreign file {min(there)!r}")
