"""Rows in a spool, as the ingest worker lays them there."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import orjson

from services.datasets.worker.plain import Plain, weigh
from services.datasets.worker.spool import Segment, Spool


@contextmanager
def spooled(
    examples: Sequence[Plain], sides: Sequence[int] = (), strata: Sequence[int] = ()
) -> Iterator[tuple[Spool, pathlib.Path]]:
    """The spool of these rows, and a folder to work in."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        segment = Segment(folder, 0)
        for i, example in enumerate(examples):
            content, characters, words = weigh(example)
            side, stratum = sides[i] if sides else 0, strata[i] if strata else 0
            segment.add(orjson.dumps(example), content, i + 1, i + 1, (characters, words), 0, stratum, side, 1)
        segment.close()
        yield Spool(folder, [0]), folder


def text(said: str) -> Plain:
    """A plain text as an example."""
    return {"completion": {"completion": said}}


def answered(question: str, answer: str) -> Plain:
    """A question and its answer."""
    asked = {"role": "ROLE_USER", "parts": [{"text": question}]}
    return {"chat": {"messages": [asked, {"role": "ROLE_ASSISTANT", "parts": [{"text": answer}]}]}}
