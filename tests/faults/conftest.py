"""Homes for tests of the trainer's faults."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from services.common import devices
from tests.house import clone_store
from tests.trainer.kit import seal_dataset


@pytest.fixture
def small_home(home: pathlib.Path) -> pathlib.Path:
    """A home with the test starter and datasets/small."""
    seal_dataset(home, "small", {"train": 12, "validation": 4})
    return home


@pytest.fixture
def held(small_home: pathlib.Path) -> Iterator[None]:
    """The device is taken: jobs stay in the queue."""
    lease = devices.acquire(small_home / "state" / "devices", devices.devices_here()[0], "the test")
    yield
    lease.release()


def lives_home(home: pathlib.Path, starter_home: pathlib.Path) -> pathlib.Path:
    """A fresh home with the test starter and datasets/small, for tests that need many."""
    clone_store(starter_home, home)
    seal_dataset(home, "small", {"train": 12, "validation": 4})
    return home
