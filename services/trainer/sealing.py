"""From an attempt's folder to the shelf: verify, copy aside, seal.

Law of this room: what a worker announced is compared byte for byte before it is
published, and it is copied, so that a worker past its time can change nothing
that was sealed. Sealing twice gives the same digest. Blocking: call it on a thread.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from qlorad.v1 import artifacts_pb2, errors_pb2
from services.common import artifacts
from services.common.errors import Fault, corrupt
from services.common.frames.v1 import training_pb2
from services.common.shelf import Sealed, Shelf


def _publish(
    shelf: Shelf,
    source: pathlib.Path,
    announced: Iterable[artifacts_pb2.FileEntry],
    kind: artifacts_pb2.ArtifactKind.ValueType,
    facts: Mapping[str, Any],
    lineage: artifacts_pb2.Lineage | None,
    provenance: tuple[str, Mapping[str, Any]],
) -> Sealed:
    staged = shelf.stage()
    try:
        if not source.is_dir():
            raise corrupt(source.name, "the folder is missing")
        shutil.copytree(source, staged.payload, dirs_exist_ok=True)
        artifacts.verify_payload(artifacts_pb2.Manifest(digest=source.name, files=announced), staged.payload)
        return shelf.seal(staged, kind, facts, lineage, provenance)
    except BaseException:
        shelf.drop(staged)
        raise


def inside(attempt: pathlib.Path, folder: str) -> pathlib.Path:
    """A folder inside the attempt's; DATA_LOSS if the name leads elsewhere."""
    path = attempt / folder
    if not folder or pathlib.PurePosixPath(folder).is_absolute() or ".." in pathlib.PurePosixPath(folder).parts:
        raise corrupt(folder, "is no folder of the attempt")
    return path


def seal_checkpoint(
    shelf: Shelf, attempt: pathlib.Path, written: training_pb2.CheckpointWritten, job: str, story: Mapping[str, Any]
) -> Sealed:
    """Publishes a checkpoint that a worker wrote."""
    source = inside(attempt, written.folder)
    facts = {"job": f"jobs/{job}", "step": written.step}
    kind = artifacts_pb2.ARTIFACT_KIND_CHECKPOINT
    return _publish(shelf, source, written.files, kind, facts, None, (job, story))


def seal_adapter(
    shelf: Shelf, attempt: pathlib.Path, finished: training_pb2.Finished, job: str, story: Mapping[str, Any]
) -> Sealed:
    """Publishes the adapter that a worker wrote."""
    source = inside(attempt, finished.folder)
    facts = json.loads(finished.facts_json)
    kind = artifacts_pb2.ARTIFACT_KIND_ADAPTER
    return _publish(shelf, source, finished.files, kind, facts, finished.lineage, (job, story))


def remove_checkpoints(shelf: Shelf, digests: Iterable[str]) -> list[str]:
    """Removes superseded checkpoints; returns those that are gone. One that another holds is left for later."""
    gone = []
    for digest in digests:
        try:
            shelf.remove("checkpoints", digest)
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND:
                continue
        gone.append(digest)
    return gone
