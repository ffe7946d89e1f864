"""docs/steps.md: its table is the code's, its examples come out as they stand."""

from __future__ import annotations

import re

import pytest

from services.datasets.worker.steps.kinds import steps as known_steps
from tests.contract.steps import PAGE, built_in, page, table
from tests.datasets.test_steps import run, said, talk

SHOWN = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", PAGE.read_text(), re.MULTILINE)


def test_the_table_is_that_of_the_code() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "run: python -m tests.contract.steps"
    names = [kind.name for kind in built_in()]
    assert len(names) == 16 and set(names) <= set(known_steps().names())
    assert all(f"| `{name}` |" in table() for name in names)


@pytest.mark.parametrize(("before", "after"), SHOWN)
def test_the_examples_of_science_come_out_as_shown(before: str, after: str) -> None:
    told = run(talk("Why?", before), ("citations", {}), ("notation", {}), ("whitespace", {}))
    assert told is not None and said(told)[1] == after


def test_examples_were_found() -> None:
    assert len(SHOWN) == 5
