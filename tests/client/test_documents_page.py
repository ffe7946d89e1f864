"""docs/documents.md, typed as it stands: every command works and says what the page shows."""

from __future__ import annotations

import pathlib
import re
import shlex

from tests.client.cli import Cli
from tests.e2e.test_readme import plain
from tests.house import ROOT

PAGE = (ROOT / "docs" / "documents.md").read_text()
COMMANDS = [
    part.splitlines()
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
]


def test_the_page_works_as_written(cli: Cli, tmp_path: pathlib.Path) -> None:
    assert len(COMMANDS) == 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command, *shown in COMMANDS:
        words = shlex.split(command)
        assert words.pop(0) == "qlorad"
        out, said = cli.both(*words, code=0, folder=tmp_path)
        lines = [plain(line) for line in [*out.splitlines(), *said.splitlines()]]
        for line in filter(None, map(plain, shown)):
            if line.endswith("…"):
                assert any(told.startswith(line.removesuffix("…").rstrip()) for told in lines), (command, line, lines)
            else:
                assert line in lines, (command, line, lines)
