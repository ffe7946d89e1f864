"""docs/estimate.md: the estimate that it shows is what the command line says."""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Callable

from tests.client.cli import Cli
from tests.house import ROOT, House

PAGE = (ROOT / "docs" / "estimate.md").read_text()
ROWS = ROOT / "examples" / "datasets" / "python-functions.jsonl"


def test_the_estimate_on_the_page_is_the_one_that_is_told(
    home: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    house, cli = house_factory(home), Cli(home)
    for service in ("datasets", "trainer"):
        house.start(service)
    cli.inside("dataset", "upload", str(ROWS), "--name", "functions", "--validation", "0.1", "--seed", "7")
    ((command, shown),) = re.findall(r"```console\n\$ qlorad (job estimate .*)\n((?:.*\n)*?)```", PAGE)
    told = cli.inside(*shlex.split(command))
    assert [line.rstrip() for line in told.splitlines()] == shown.splitlines()
