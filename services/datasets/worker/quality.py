"""A score for a dataset that says how it was made.

Law of this room: pure; the score is the weighted mean of parts that are told.
No part rises with a fault. Weights of parts that were not looked for go to the
others in proportion, so that they always sum to one. docs/quality.md is the
same in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlorad.v1 import datasets_pb2
from services.datasets.worker.rules import FEW_ROWS, SHORT_OUTPUT_WORDS

WEIGHTS: Mapping[str, float] = {
    "valid_rows": 0.30,
    "unique_rows": 0.15,
    "near_duplicates": 0.10,
    "size": 0.10,
    "output_length": 0.10,
    "private_data": 0.10,
    "texts": 0.10,
    "turns": 0.05,
}
FULL_AT: Mapping[str, float] = {
    "valid_rows": 0.25, "unique_rows": 0.5, "near_duplicates": 0.5, "private_data": 0.1, "texts": 0.25, "turns": 0.25,
}  # fmt: skip
"""The share of rows with the fault at which a part is 0; it falls in a straight line from 100."""
PRIVATE = ("secret", "personal_data")
TEXTS = ("mojibake", "replacement_character", "control_character", "byte_order_mark_in_text", "short_output")
TURNS = ("ends_without_answer", "empty_turn", "unknown_message_field")


@dataclass(frozen=True, slots=True)
class Figures:
    """What the score is made of."""

    read: int
    skipped: int
    repeated: int
    near: int | None
    """None where nobody looked for them."""
    kept: int
    words: int
    findings: Mapping[str, int]


def score(figures: Figures) -> datasets_pb2.Quality:
    """The score and its parts; 0 where no row is left."""
    parts = list(_parts(figures))
    whole = sum(WEIGHTS[name] for name, _, _ in parts)
    quality = datasets_pb2.Quality()
    for name, value, told in parts:
        value = value if figures.kept else 0.0
        quality.parts.add(name=name, score=round(value, 1), weight=WEIGHTS[name] / whole, told=told)
        quality.score += value * WEIGHTS[name] / whole
    quality.score = round(min(100.0, max(0.0, quality.score)), 1)
    return quality


def _parts(f: Figures) -> Iterator[tuple[str, float, str]]:
    read = max(1, f.read)
    passed = max(1, f.read - f.skipped)
    yield "valid_rows", _left("valid_rows", f.skipped / read), f"{f.skipped} of {f.read} rows have errors"
    told = f"{f.repeated} of {passed} rows repeat an earlier one"
    yield "unique_rows", _left("unique_rows", f.repeated / passed), told
    if f.near is not None:
        told = f"{f.near} of {passed} rows are nearly equal to another"
        yield "near_duplicates", _left("near_duplicates", f.near / passed), told
    yield "size", 100.0 * min(1.0, f.kept / FEW_ROWS), f"{f.kept} rows; {FEW_ROWS} or more teach better"
    average = f.words / max(1, f.kept)
    told = f"outputs have {average:.1f} words on average; {SHORT_OUTPUT_WORDS} or more are full marks"
    yield "output_length", 100.0 * min(1.0, average / SHORT_OUTPUT_WORDS), told
    for name, rules, what in (
        ("private_data", PRIVATE, "secrets or personal data"),
        ("texts", TEXTS, "broken characters or hardly a word"),
        ("turns", TURNS, "turns that are empty, unanswered or hold what training does not see"),
    ):
        found = sum(f.findings.get(rule, 0) for rule in rules)
        yield name, _left(name, found / passed), f"{found} finding{'s' * (found != 1)} of {what} in {passed} rows"


def _left(name: str, share: float) -> float:
    """What is left of 100 at a share of rows with the fault."""
    return 100.0 * max(0.0, 1.0 - share / FULL_AT[name])
