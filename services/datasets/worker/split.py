"""Which rows are set aside: by content and seed, never by place.

Law of this room: pure. Rows of equal content are one group and go to one side.
A group's rank is a hash of its content keyed by the seed; the lowest ranks are
validation, the next test. So the split does not change when rows change order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection
from dataclasses import dataclass

from qlorad.v1 import datasets_pb2
from services.datasets.worker.found import Problem


def content_hash(example: datasets_pb2.Example) -> bytes:
    """16 bytes that are equal for equal content; metadata and origin do not count."""
    body = datasets_pb2.Example()
    body.CopyFrom(example)
    body.ClearField("metadata")
    body.ClearField("origin")
    for message in body.chat.messages if body.WhichOneof("body") == "chat" else ():
        # How a text is cut into parts is no content.
        text = "".join(part.text for part in message.parts)
        del message.parts[:]
        if text:
            message.parts.add(text=text)
    return hashlib.blake2b(body.SerializeToString(deterministic=True), digest_size=16).digest()


def rank(content: bytes, seed: int) -> int:
    """The group's place in the draw of this seed."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little")


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the draw is cut: ranks up to these go to validation, then to test."""

    seed: int
    validation: int
    test: int

    def side(self, content: bytes) -> str:
        """The split of a group."""
        if self.validation < 0 and self.test < 0:
            return "train"
        at = rank(content, self.seed)
        if at <= self.validation:
            return "validation"
        return "test" if at <= self.test else "train"


def share(groups: int, fraction: float) -> int:
    """How many groups a fraction is; at least one of a fraction above zero."""
    return max(1, round(groups * fraction)) if fraction > 0 else 0


def cut(groups: Collection[bytes], asked: datasets_pb2.Split) -> Cut | Problem:
    """The cut that gives each side its share of groups, or why that cannot be."""
    validation = share(len(groups), asked.validation_fraction)
    test = share(len(groups), asked.test_fraction)
    if validation + test >= len(groups) and validation + test > 0:
        told = (
            f"of {len(groups)} different rows {validation} go to validation and {test} to test; none is left to train"
        )
        return Problem("split_leaves_nothing", told, "smaller fractions, or more rows")
    lowest = heapq.nsmallest(validation + test, (rank(g, asked.seed) for g in groups))
    return Cut(
        asked.seed,
        lowest[validation - 1] if validation else -1,
        lowest[validation + test - 1] if test else -1,
    )
