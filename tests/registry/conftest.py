"""A registry over a home of its own that holds the starter."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests import house as houses
from tests.house import clone_store
from tests.registry.doors import Doors, open_doors


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> Iterator[Doors]:
    """One registry for all tests of a file; each uses names of its own."""
    home = tmp_path_factory.mktemp("registry") / "home"
    clone_store(starter_home, home)
    with houses.house(home) as house:
        yield open_doors(house)
