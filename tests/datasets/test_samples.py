"""The shipped rows: sound code, each of it run, no two alike."""

from __future__ import annotations

import ast
import builtins
import doctest
import json

import pytest

from tests.house import ROOT

SAMPLES = ROOT / "examples" / "datasets" / "python-functions.jsonl"


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in SAMPLES.read_text().splitlines()]


def test_there_are_enough_rows_and_each_is_whole() -> None:
    found = rows()
    assert len(found) >= 150
    for row in found:
        assert list(row) == ["instruction", "input", "output", "example", "expected"]
        assert row["instruction"].startswith("Write a ") and row["instruction"].endswith(".")
        assert row["input"] == ""
        assert row["output"].startswith("from __future__ import annotations\n\n")
        assert row["output"] == row["output"].strip()
        assert len(row["output"].splitlines()) <= 20 and len(row["output"]) <= 700
    assert len({row["instruction"] for row in found}) == len(found)


@pytest.mark.parametrize("row", rows(), ids=lambda row: ast.parse(row["output"]).body[-1].name)
def test_the_function_does_what_its_example_says(row: dict[str, str]) -> None:
    tree = ast.parse(row["output"])
    *imports, function = tree.body
    assert isinstance(function, ast.FunctionDef) and all(isinstance(n, ast.ImportFrom | ast.Import) for n in imports)
    space: dict[str, object] = {}
    exec(compile(tree, "row", "exec"), space)
    assert repr(eval(row["example"], space)) == row["expected"]
    assert function.name in row["example"]
    (shown,) = doctest.DocTestFinder().find(space[function.name], function.name, globs=space)
    assert [e.source.strip() for e in shown.examples] == [row["example"]]
    assert doctest.DocTestRunner(verbose=False).run(shown) == (0, 1)


class _Renamed(ast.NodeTransformer):
    """Gives every name that the code itself binds a number, and drops docstrings."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return name if hasattr(builtins, name) else self.names.setdefault(name, f"n{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._name(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self._name(node.arg))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self._name(node.name)
        if ast.get_docstring(node):
            node.body = node.body[1:]
        return self.generic_visit(node)


def shape(code: str) -> str:
    return ast.dump(_Renamed().visit(ast.parse(code)))


def test_no_two_functions_are_equal_after_renaming() -> None:
    assert shape("def f(a):\n    'x'\n    return a + 1") == shape("def g(b):\n    return b + 1")
    assert shape("def f(a):\n    return a + 1") != shape("def f(a):\n    return a + 2")
    shapes = [shape(row["output"]) for row in rows()]
    assert len(set(shapes)) == len(shapes)
