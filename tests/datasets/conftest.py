"""One daemon for tests that only look; one of its own for tests that kill."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest

from tests.datasets.kit import Door, open_door
from tests.house import House, house


@pytest.fixture(scope="package")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A daemon that tests of this folder share; use names of your own."""
    with house(tmp_path_factory.mktemp("datasets") / "home") as h:
        yield open_door(h)


@pytest.fixture
def own_door(tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]) -> Callable[..., Door]:
    """Starts a daemon in a home of this test's own, with flags."""
    return lambda *flags: open_door(house_factory(tmp_path / "home"), *flags)
