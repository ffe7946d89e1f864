"""What tests of PDFs ask of one: its text, what was kept, or why it was refused."""

from __future__ import annotations

import pytest

from services.datasets.worker.documents import kinds
from services.datasets.worker.documents.blocks import PROSE, Block, Document
from services.datasets.worker.found import Unreadable

TALE = (
    "The station stands on a hill above the river. Every morning somebody walks up, reads the gauge and writes what it "
    "shows into a book. Nobody has missed a day since the bridge was built, and that is longer than anyone remembers."
)


def read(data: bytes) -> Document:
    return kinds.read(data, "a.pdf")


def kept(data: bytes) -> list[Block]:
    return [b for b in read(data).blocks if not b.left]


def prose(data: bytes) -> str:
    return " ".join(b.text for b in kept(data) if b.kind == PROSE)


def refused(data: bytes) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        read(data)
    return caught.value
