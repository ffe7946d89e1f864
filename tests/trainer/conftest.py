"""Homes and trainers for these tests."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.house import House, house
from tests.trainer.kit import seal_dataset


@pytest.fixture
def small_home(home: pathlib.Path) -> pathlib.Path:
    """A home with the test starter and datasets/small (12 rows, 4 for validation)."""
    seal_dataset(home, "small", {"train": 12, "validation": 4})
    return home


@pytest.fixture
def trainer(small_home: pathlib.Path) -> Iterator[House]:
    """A house with a running trainer that retries at once."""
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0")
        yield made
