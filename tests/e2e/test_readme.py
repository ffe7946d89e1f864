"""The README's tour, typed as it stands: every command works and says what the page shows."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.house import ROOT

README = (ROOT / "README.md").read_text()
_BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)
# What differs between machines and runs: digests, numbers, the blanks that align columns.
_VARIES = (
    (re.compile(r"sha256:[0-9a-f]+|\b[0-9a-f]{32}\b"), "DIGEST"),
    (re.compile(r"[0-9]+(?:[.:e+-][0-9]+)*"), "N"),
    (re.compile(r" +"), " "),
)


def blocks() -> list[tuple[str, str]]:
    """Kind and text of every block that a reader would type, in order."""
    return [(m[1], m[2]) for m in _BLOCK.finditer(README)]


def plain(line: str) -> str:
    """A line without what varies."""
    for pattern, word in _VARIES:
        line = pattern.sub(word, line)
    return line.strip()


def type_in(words: list[str], home: pathlib.Path) -> str:
    """Runs one command in a home and returns what a reader would see."""
    if words[0] == "qlorad":
        words = [sys.executable, "-m", "qlorad.cli.main", *words[1:]]
    done = subprocess.run(
        words,
        env={**os.environ, "QLORAD_HOME": str(home)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture
def up_home(home: pathlib.Path) -> Iterator[pathlib.Path]:
    """A home whose daemons are down again at the end, whatever happens."""
    yield home
    subprocess.run(
        [sys.executable, "-m", "qlorad.cli.main", "down"],
        env={**os.environ, "QLORAD_HOME": str(home)},
        capture_output=True,
        timeout=60,
    )


def test_the_tour_works_as_written(up_home: pathlib.Path) -> None:
    typed = 0
    for kind, text in blocks():
        if kind == "python":
            assert "from __future__" in type_in([sys.executable, "-c", text], up_home)
            continue
        command, *shown = text.removeprefix("$ ").splitlines()
        words = shlex.split(command)
        typed += 1
        if words[:2] == ["qlorad", "up"]:
            words += ["--ports", "0"]  # the page's fixed ports may be taken here
            shown = [line for line in shown if not line.startswith("home ")]  # the page's own home
        if words[:2] == ["qlorad", "compare"]:
            shown = [line for line in shown if line.startswith("===")]  # what a starter babbles is its own affair
        said = {plain(line) for line in type_in(words, up_home).splitlines()}
        missing = [line for line in shown if plain(line) not in said]
        assert not missing, f"{command}\nnever said: {missing}\nbut: {sorted(said)}"
    assert typed == 9


def test_the_two_commands_are_targets_of_make() -> None:
    for target in ("demo", "test", "setup"):
        assert f"make {target}" in README
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_page_it_names_is_there() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []
