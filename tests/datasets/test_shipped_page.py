"""docs/shipped.md: it is of the files that are shipped today; each set lowers the hold-out loss by 30 %; samples."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.datasets.shipped import SHELF
from tests.house import ROOT, clone_store

ROW = re.compile(
    r"\| ([a-z-]+) \| `([0-9a-f]{16})` \| (\d+) \| (\d+) \| \d+ \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|"
)
SAMPLE = re.compile(
    r"Asked, and never learnt:\n\n~~~~text\n(.*?)\n~~~~\n\nThe base says:\n\n~~~~text\n(.*?)\n~~~~\n\n"
    r"After \d+ steps:\n\n~~~~text\n(.*?)\n~~~~",
    re.DOTALL,
)
FILES = {
    "python-functions": "python-functions.jsonl",
    "code-review": "code-review.jsonl",
    "coding-principles": "coding-principles.jsonl",
    "genomics-papers": "genomics-papers.json",
}
LEAST = 0.30


def lessons(page: str) -> dict[str, tuple[str, int, int, float]]:
    """By set: the beginning of the file's digest, rows learnt and held out, and by how much the loss fell."""
    found = {}
    for name, digest, learnt, held_out, before, after, less in ROW.findall(page):
        drop = 1 - float(after) / float(before)
        assert abs(100 * drop - float(less)) <= 0.6
        found[name] = (digest, int(learnt), int(held_out), drop)
    return found


def test_the_page_is_of_the_files_and_each_loss_fell_by_30_percent() -> None:
    page = (ROOT / "docs" / "shipped.md").read_text()
    told = lessons(page)
    assert list(told) == list(FILES)
    for name, file in FILES.items():
        digest, learnt, held_out, drop = told[name]
        assert hashlib.sha256((SHELF / file).read_bytes()).hexdigest().startswith(digest), file
        assert drop >= LEAST, name
        assert 0.05 <= held_out / (learnt + held_out) <= 0.2
    assert "Below" not in page
    samples = SAMPLE.findall(page)
    assert len(samples) == 8
    for question, base, tuned in samples:
        assert question.strip() and tuned.strip() and tuned != base


@pytest.mark.slow
def test_the_lessons_at_test_size_make_a_page(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    home, page = tmp_path / "home", tmp_path / "shipped.md"
    clone_store(starter_home, home)
    command = [sys.executable, str(ROOT / "examples" / "learn_shipped.py"), "--size", "test", "--threads", "1"]
    done = subprocess.run(
        [*command, "--sets", "coding-principles", "genomics-papers", "--page", str(page)],
        env={**os.environ, "QLORAD_HOME": str(home), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    told = lessons(page.read_text("utf-8"))
    assert list(told) == ["coding-principles", "genomics-papers"]
    assert told["coding-principles"][1:3] == (90, 10) and told["genomics-papers"][1] + told["genomics-papers"][2] == 195
    assert min(drop for *_, drop in told.values()) >= 0.05
    assert len(SAMPLE.findall(page.read_text("utf-8"))) == 4
