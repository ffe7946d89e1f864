"""A house that is up, with a model, a dataset and a trained adapter on its shelf."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.client.cli import Cli, up
from tests.house import clone_store


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory, trained_home: pathlib.Path) -> Iterator[Cli]:
    """The command line of a home that holds starter-test, datasets/sample, adapters/sample; its daemons are up."""
    home = tmp_path_factory.mktemp("client") / "home"
    clone_store(trained_home, home)
    with up(home) as cli:
        yield cli
