"""A large JSONL file in stretches, so that several processes can parse it."""

from __future__ import annotations

import pathlib

from services.common.frames.v1 import ingest_pb2
from services.datasets.worker.parse import Place


class Chunks:
    """Stretches of whole lines."""

    @classmethod
    def of(cls, path: pathlib.Path, container: str, order: ingest_pb2.IngestOrder, place: Place) -> Chunks | None:
        """The stretches of a file worth it; None for all others."""
        return None
