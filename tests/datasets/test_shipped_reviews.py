"""The shipped code reviews: diffs that apply, code that compiles, findings of many kinds, praise where it is due."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest

from tests.datasets.shipped import LICENCE, SHELF, TOLD, alike, rows, validated
from tests.datasets.spooled import answered

NAME = "code-review.jsonl"
FIELDS = ["instruction", "input", "output", "kind", "severity", "before", "license"]
SEVERITIES = {"none", "low", "medium", "high", "critical"}
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
ANSWER = re.compile(r"Severity: (\w+) \(([^)\n]+)\)\.\n\n([^\n]+)\n\n```python\n(.*)```", re.DOTALL)
PRAISE = re.compile(r"Verdict: good as it is\.\n\n([^\n]+)")


def applied(before: str, diff: str) -> str:
    """The text after a unified diff of one file; ValueError where the diff and the text do not fit exactly."""
    old, lines = before.splitlines(), diff.splitlines()
    if not (lines[0].startswith("--- a/") and lines[1] == "+++ b/" + lines[0].removeprefix("--- a/")):
        raise ValueError("the diff names no file, or two")
    new: list[str] = []
    place, at = 0, 2
    while at < len(lines):
        match = HUNK.fullmatch(lines[at])
        if match is None:
            raise ValueError(f"{lines[at]!r} is no head of a hunk")
        start, had, begin, has = (int(g) if g else 1 for g in match.groups())
        first = start - 1 if had else start
        new += old[place:first]
        place, at = first, at + 1
        if len(new) != (begin - 1 if has else begin):
            raise ValueError("the hunk begins elsewhere in the new text")
        while had or has:
            sign, line = (lines[at][:1] or " "), lines[at][1:]
            if sign not in " -+" or (sign in " -" and (place >= len(old) or old[place] != line)):
                raise ValueError(f"{lines[at]!r} does not fit line {place + 1}")
            if sign in " -":
                place, had = place + 1, had - 1
            if sign in " +":
                new.append(line)
                has -= 1
            at += 1
    return "\n".join([*new, *old[place:]]) + "\n"


def compiled(code: str) -> ast.Module:
    """The tree of code that compiles; what it warns of may be what the review is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        compile(code, "row", "exec")
        return ast.parse(code)


def improved(row: dict[str, Any]) -> str:
    match = ANSWER.fullmatch(row["output"])
    assert match, row["instruction"]
    return match[4]


def test_there_are_250_rows_and_each_is_whole() -> None:
    found = rows(NAME)
    assert len(found) == 250
    for row in found:
        assert list(row) == FIELDS and row["license"] == LICENCE
        assert re.fullmatch(r"Review this change: [A-Z].*[^.]\.", row["instruction"])
        assert row["severity"] in SEVERITIES
        if row["severity"] == "none":
            praise = PRAISE.fullmatch(row["output"])
            assert praise and row["kind"] == "good" and len(praise[1]) >= 120
        else:
            answer = ANSWER.fullmatch(row["output"])
            assert answer and (answer[1], answer[2]) == (row["severity"], row["kind"]) and len(answer[3]) >= 120
    assert len({row["instruction"] for row in found}) == len(found)


def test_kinds_are_many_and_some_changes_are_good() -> None:
    kinds = Counter(row["kind"] for row in rows(NAME))
    asked = {
        "resource leak", "mutable default", "off by one", "swallowed exception", "race", "SQL injection",
        "path traversal", "time zone", "float money", "N+1 reads", "unbounded cache", "wrong retry", "async misuse",
        "naming", "dead code", "test that cannot fail",
    }  # fmt: skip
    assert asked <= set(kinds) and len(kinds) >= 50 and 20 <= kinds["good"] <= 40
    assert min(kinds[k] for k in asked) >= 3
    assert set(Counter(row["severity"] for row in rows(NAME))) == SEVERITIES


def test_each_diff_applies_and_all_code_compiles() -> None:
    for row in rows(NAME):
        after = applied(row["before"], row["input"])
        assert after != row["before"]
        compiled(row["before"])
        tree = ast.dump(compiled(after))
        if row["severity"] != "none":
            assert ast.dump(compiled(improved(row))) != tree, row["instruction"]


@pytest.mark.parametrize(
    "diff",
    [
        "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n-x\n+c",
        "--- a/f\n+++ b/f\n@@ -2 +2 @@\n-a\n+c",
        "--- a/f\n+++ b/f\n@@ -1 +2 @@\n-a\n+c",
        "--- a/f\n+++ b/g\n@@ -1 +1 @@\n-a\n+c",
        "--- a/f\n+++ b/f\n-a\n+c",
        "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n-a\n b\n x\n+c",
    ],
)
def test_a_diff_that_does_not_fit_is_told(diff: str) -> None:
    assert applied("a\nb\n", "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n-a\n+c\n b") == "c\nb\n"
    with pytest.raises(ValueError):
        applied("a\nb\n", diff)


def test_improved_code_uses_no_unknown_and_no_useless_name(tmp_path: pathlib.Path) -> None:
    found = [improved(row) for row in rows(NAME) if row["severity"] != "none"]
    for number, code in enumerate(found):
        (tmp_path / f"improved_{number}.py").write_text(code, "utf-8")
    (tmp_path / "planted.py").write_text("import os\n\n\ndef f():\n    return g()\n", "utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--target-version", "py311"]
    told = subprocess.run(
        [*command, "--select", "F", "--output-format", "json", str(tmp_path)], capture_output=True, text=True
    )
    faults = [(pathlib.Path(f["filename"]).name, f["code"]) for f in json.loads(told.stdout)]
    assert len(found) >= 200 and sorted(faults) == [("planted.py", "F401"), ("planted.py", "F821")]


def test_no_two_rows_are_nearly_equal_with_or_without_code() -> None:
    found = rows(NAME)
    assert alike([answered(row["instruction"] + row["input"], row["output"]) for row in found]) == []
    assert alike([answered("change", row["input"]) for row in found]) == []
    assert alike([answered("finding", row["output"].split("\n\n")[1]) for row in found]) == []


def test_the_worker_finds_no_fault() -> None:
    done, findings = validated(SHELF / NAME)
    assert done.stats.rows["train"] == 250 and done.stats.skipped_rows == done.stats.duplicate_rows == 0
    assert set(findings) <= TOLD, findings
