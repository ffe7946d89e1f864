"""The datasets under examples/: how tests read them, and hold them against the worker's own rules."""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import near
from services.datasets.worker.ingest import Ingest
from services.datasets.worker.plain import Plain
from tests.datasets.spooled import spooled
from tests.house import ROOT

SHELF = ROOT / "examples" / "datasets"
LICENCE = "Apache-2.0"
SIMILARITY = 0.8
TOLD = {"format", "few_rows", "short_outputs"}
"""Findings that say nothing against a row."""


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a shipped JSONL file."""
    return [json.loads(line) for line in (SHELF / name).read_text().splitlines()]


def validated(path: pathlib.Path, **fields: Any) -> tuple[ingest_pb2.IngestDone, dict[str, int]]:
    """What ValidateDataset's own worker code says of a file, near-duplicates sought; and its findings, counted."""
    request = datasets_pb2.CreateDatasetRequest(near_duplicates=datasets_pb2.NEAR_DUPLICATES_TOGETHER, **fields)
    with tempfile.TemporaryDirectory() as scratch:
        order = ingest_pb2.IngestOrder(scratch=scratch, validate_only=True, request=request)
        order.sources.add(path=str(path), filename=path.name)
        done = Ingest(order, lambda *_: None).run()
    return done, {f"{c.rule}": c.count for c in done.finding_counts}


def alike(examples: list[Plain], similarity: float = SIMILARITY) -> list[tuple[int, int]]:
    """The places of examples that are nearly equal to an earlier one, and of that one."""
    with spooled(examples) as (spool, folder):
        kept = np.ones(len(examples), bool)
        groups = near.groups(spool, kept, similarity, folder, lambda *_: None)
    return [(at, int(first)) for at, first in enumerate(groups) if first != at]
