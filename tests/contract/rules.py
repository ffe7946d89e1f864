"""The rules that the code of the datasets service can name, read from its source.

A rule is the first argument of Problem(...) or of Row.wrong(...). Where it is a
variable it stands in INDIRECT, and test_rules_page fails when such a place is added.
"""

from __future__ import annotations

import ast
import pathlib
import re
from dataclasses import dataclass, field

from services.datasets import repairs
from services.datasets.worker.documents.left import REASONS
from services.datasets.worker.private import PERSONAL, SECRET
from tests.house import ROOT

PAGE = ROOT / "docs" / "quality.md"
WORKER = ROOT / "services" / "datasets" / "worker"
INDIRECT = {
    "private.py": {SECRET: "warning", PERSONAL: "warning"},
    "packed.py": {"broken_packing": "error", "trailing_bytes": "error"},
    "row.py": {},  # Row.wrong itself
    "findings.py": {},  # a finding that is read again
    "chat.py": {},  # what is wrong with JSON inside of a text
    "left.py": {reason: "info" for reason in REASONS},
    "apart.py": {},  # what another process found
}
"""Files that make problems of a rule that they were given, and which."""
_SEVERITIES = ("ERROR", "WARNING", "INFO")


@dataclass(slots=True)
class Rule:
    """What the code says of a rule."""

    severities: set[str] = field(default_factory=set)
    repairs: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def in_code() -> tuple[dict[str, Rule], set[str]]:
    """Every rule, and the files with a problem whose rule is a variable."""
    found: dict[str, Rule] = {}
    indirect: set[str] = set()
    for path in sorted(WORKER.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in ("Problem", "wrong"):
                continue
            told = call.args[0]
            if not isinstance(told, ast.Constant):
                indirect.add(path.name)
                continue
            rule = found.setdefault(str(told.value), Rule())
            rule.files.add(path.name)
            given = {k.arg: k.value for k in call.keywords}
            rest = dict(zip(("message", "hint", "field", "severity", "repair"), call.args[1:], strict=False))
            given |= rest if name == "Problem" else {}
            rule.severities |= _severities(given.get("severity"))
            if "repair" in given:
                rule.repairs |= _repairs(given["repair"], path)
    for name, rules in INDIRECT.items():
        for rule_name, severity in rules.items():
            found.setdefault(rule_name, Rule()).severities.add(severity)
            found[rule_name].files.add(name)
    return found, indirect


def _severities(node: ast.expr | None) -> set[str]:
    if node is None:
        return {"error"}
    named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in _SEVERITIES}
    return {n.lower() for n in named} or {"warning", "error"}  # a variable: as the caller has it


def _repairs(node: ast.expr, path: pathlib.Path) -> set[str]:
    names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    if isinstance(node, ast.Name):  # told some lines above: the last time before
        lines = path.read_text(encoding="utf-8").splitlines()[: node.lineno]
        names = set(re.findall(r"repairs\.([A-Z_]+)", next(t for t in reversed(lines) if re.match(r"\s+repair = ", t))))
    return {getattr(repairs, n) for n in names if n.isupper()}


def in_page() -> dict[str, tuple[set[str], set[str]]]:
    """Every rule of the page's tables: its severities and its repairs."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    row = re.compile(r"^\| `(\w+)` \| ([a-z, ]+) \| .*? \| (—|(?:`\w+`(?:, )?)+) \|$", re.M)
    for rule, severities, mended in row.findall(PAGE.read_text(encoding="utf-8")):
        assert rule not in found, f"{rule} stands twice in {PAGE.name}"
        found[rule] = (set(severities.split(", ")), set(re.findall(r"\w+", mended)) - {"—"})
    return found
