"""Checkpoints as callers see them: which there are, and one made an adapter.

Law of this room: a checkpoint holds a whole adapter (`adapter/`) and what is
known of it (`adapter.json`); publishing copies, and reads no tensor. Blocking:
call it on a thread.
"""

from __future__ import annotations

import json
import re
import shutil

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, errors_pb2, trainer_pb2
from services.common import names
from services.common.errors import Fault, Violation, corrupt, invalid, not_found, rejected, show
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import retention

ADAPTER = "adapter"
ABOUT = "adapter.json"
_NAME = re.compile(r"jobs/([^/]+)/checkpoints/([1-9][0-9]{0,17})")


def listed(shelf: Shelf, record: training_pb2.JobRecord) -> list[trainer_pb2.Checkpoint]:
    """The checkpoints that a job keeps, oldest first. One that has just been superseded is left out."""
    found, kept = [], retention.reasons(record.marks, record.job.spec.train)
    for mark in record.marks:
        try:
            sealed = shelf.open("checkpoints", mark.digest)
        except Fault as fault:
            if fault.reason != errors_pb2.REASON_NOT_FOUND:
                raise
            continue
        checkpoint = trainer_pb2.Checkpoint(
            name=f"{record.job.name}/checkpoints/{mark.step}",
            step=mark.step,
            digest=mark.digest,
            size_bytes=sealed.size_bytes,
            create_time=sealed.manifest.create_time,
            kept_as=kept[mark.step],
        )
        if mark.HasField("eval_loss"):
            checkpoint.eval_loss = mark.eval_loss
        found.append(checkpoint)
    return found


def read_name(request: trainer_pb2.PublishCheckpointRequest) -> tuple[str, int]:
    """Job and step of a request; INVALID_ARGUMENT with ALL that is wrong."""
    wrong = names.check_request_id(request.request_id)
    match = _NAME.fullmatch(request.name)
    if match is None or not names.JOB.fullmatch(match[1]):
        wrong.append(Violation("name", show(request.name), "'jobs/ID/checkpoints/STEP'"))
    if request.adapter:
        alias = request.adapter.removeprefix("adapters/")
        if alias == request.adapter or not names.is_alias(alias):
            wrong.append(Violation("adapter", show(request.adapter), f"'adapters/ALIAS'; {names.ALIAS_RULE}"))
    if wrong or match is None:
        raise invalid(wrong)
    return match[1], int(match[2])


def publish(
    shelf: Shelf, record: training_pb2.JobRecord, step: int, adapter: str
) -> trainer_pb2.PublishCheckpointResponse:
    """Seals the adapter of a kept checkpoint, and points the alias to it."""
    name = f"{record.job.name}/checkpoints/{step}"
    mark = next((m for m in record.marks if m.step == step), None)
    if mark is None:
        raise not_found(name, [f"{record.job.name}/checkpoints/{m.step}" for m in record.marks])
    pin = shelf.pin(mark.digest, f"publish of {record.job.name.removeprefix('jobs/')}")
    try:
        source = shelf.open("checkpoints", mark.digest, verify=True)
        if not (source.payload / ABOUT).exists():
            raise rejected(name, "is of before checkpoints held whole adapters; let the job write another one")
        try:
            about = json.loads((source.payload / ABOUT).read_text())
            lineage = json_format.ParseDict(about["lineage"], artifacts_pb2.Lineage())
            facts = dict(about["facts"])
        except (ValueError, KeyError, TypeError, json_format.ParseError) as e:
            raise corrupt(name, f"{ABOUT} cannot be read: {e}") from None
        story = {"job": record.job.name, "checkpoint": mark.digest, "step": step}
        staged = shelf.stage()
        try:
            shutil.copytree(source.payload / ADAPTER, staged.payload, dirs_exist_ok=True)
            kind = artifacts_pb2.ARTIFACT_KIND_ADAPTER
            maker = f"{record.job.name.removeprefix('jobs/')}-{step}"
            sealed = shelf.seal(staged, kind, facts, lineage, (maker, story))
        except BaseException:
            shelf.drop(staged)
            raise
        if adapter:
            shelf.set_alias("adapters", adapter.removeprefix("adapters/"), sealed.digest)
    finally:
        pin.release()
    return trainer_pb2.PublishCheckpointResponse(digest=sealed.digest, adapter=adapter, size_bytes=sealed.size_bytes)
