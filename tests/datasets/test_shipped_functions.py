"""The shipped functions: sound code, each of it run, of many topics, no two alike."""

from __future__ import annotations

import ast
import builtins
import json
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

from tests.datasets.shipped import LICENCE, SHELF, TOLD, alike, rows, validated
from tests.datasets.spooled import answered

NAME = "python-functions.jsonl"
RUNNER = pathlib.Path(__file__).with_name("run_functions.py")
FIELDS = ["instruction", "input", "output", "topic", "example", "expected", "license"]


def function_of(code: str) -> ast.FunctionDef:
    *imports, function = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef) and all(isinstance(n, ast.ImportFrom | ast.Import) for n in imports)
    return function


def run(given: list[dict[str, Any]], seconds: float) -> dict[str, str]:
    """The faults of functions and examples, run in one child with limits, by place."""
    command = [sys.executable, "-I", str(RUNNER), str(seconds)]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(command, input=json.dumps(given), cwd=folder, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout))


def test_there_are_500_rows_and_each_is_whole() -> None:
    found = rows(NAME)
    assert len(found) == 500
    for row in found:
        assert list(row) == FIELDS and row["license"] == LICENCE and row["input"] == ""
        assert row["instruction"].startswith("Write a ") and row["instruction"].endswith(".")
        assert row["output"].startswith("from __future__ import annotations\n\n")
        assert row["output"] == row["output"].strip()
        assert len(row["output"].splitlines()) <= 45 and max(map(len, row["output"].splitlines())) <= 120
    assert len({row["instruction"] for row in found}) == len(found)
    assert len({function_of(row["output"]).name for row in found}) == len(found)


def test_topics_are_many_and_none_is_the_whole_shelf() -> None:
    topics = Counter(row["topic"] for row in rows(NAME))
    assert len(topics) >= 40
    assert min(topics.values()) >= 4 and max(topics.values()) <= 20


def test_each_function_has_type_hints_and_a_docstring() -> None:
    for row in rows(NAME):
        function = function_of(row["output"])
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        given += [a for a in (function.args.vararg, function.args.kwarg) if a]
        assert function.returns is not None and all(a.annotation for a in given), function.name
        assert (ast.get_docstring(function) or "").splitlines()[0].endswith("."), function.name


def test_each_function_does_what_its_example_says() -> None:
    assert run(rows(NAME), seconds=5) == {}


def test_what_runs_them_sees_faults() -> None:
    sound = {
        "output": "def one() -> int:\n    '''Return 1.\n\n    >>> one()\n    1\n    '''\n    return 1",
        "example": "one()",
        "expected": "1",
    }
    loops = sound["output"].replace("return 1", "while True: pass")
    planted: list[dict[str, Any]] = [
        sound,
        {**sound, "expected": "2"},
        {**sound, "output": sound["output"].replace("    1\n", "    3\n")},
        {**sound, "output": sound["output"].replace("return 1", "return 1 / 0")},
        {**sound, "output": loops},
        {**sound, "output": sound["output"].replace("return 1", "return open('x', 'wb', 0).write(b'x')")},
        {**sound, "output": sound["output"].replace("return 1", "return len(bytearray(1 << 31))")},
        {**sound, "example": "two()"},
    ]
    faults = run(planted, seconds=0.2)
    assert sorted(faults, key=int) == ["1", "2", "3", "4", "5", "6", "7"]
    assert "gives 1, not 2" in faults["1"] and "doctest" in faults["2"] and "ZeroDivision" in faults["3"]
    assert "too long" in faults["4"] and "File too large" in faults["5"] and "MemoryError" in faults["6"]


class _Renamed(ast.NodeTransformer):
    """Gives every name that the code itself binds a number, makes constants equal, and drops docstrings and hints."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return name if hasattr(builtins, name) else self.names.setdefault(name, f"n{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._name(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self._name(node.arg))

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(0)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return self.visit(ast.Assign([node.target], node.value)) if node.value else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name, node.returns = self._name(node.name), None
        if ast.get_docstring(node):
            node.body = node.body[1:]
        return self.generic_visit(node)


def shape(code: str) -> str:
    """A function as it is once its names and constants are made equal; imports do not count."""
    function = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)][-1]
    return ast.dump(_Renamed().visit(function))


def test_no_two_functions_are_equal_after_renaming() -> None:
    assert shape("def f(a: int) -> int:\n    'x'\n    return a + 1") == shape("def g(b):\n    return b + 2")
    assert shape("def f(a):\n    n: int = a\n    return n") == shape("def f(a):\n    m = a\n    return m")
    assert shape("def f(a):\n    return a + 1") != shape("def f(a):\n    return a - 1")
    shapes = [shape(row["output"]) for row in rows(NAME)]
    assert len(set(shapes)) == len(shapes) == 500


def test_no_two_rows_are_nearly_equal_with_or_without_what_all_share() -> None:
    whole = [answered(row["instruction"], row["output"]) for row in rows(NAME)]
    bodies = [answered("code", row["output"].split('"""', 2)[2]) for row in rows(NAME)]
    assert alike(whole) == [] and alike(bodies) == []
    copied = rows(NAME)[7]["output"].replace("limit", "bound")
    assert alike([*whole, answered(rows(NAME)[7]["instruction"], copied)]) == [(500, 7)]


def test_the_worker_finds_no_fault() -> None:
    done, findings = validated(SHELF / NAME)
    assert done.stats.rows["train"] == 500 and done.stats.skipped_rows == done.stats.duplicate_rows == 0
    assert set(findings) <= TOLD, findings
