"""Makes the table in docs/steps.md of the steps that are built in, by asking the code.

`python -m tests.contract.steps` writes it (`make proto` does too);
tests/datasets/test_steps_page.py holds the page against the code.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from services.common.worker.plugins import Kind
from services.datasets.worker.steps.kinds import steps
from tests.house import ROOT

PAGE = ROOT / "docs" / "steps.md"
BEGIN = "<!-- made by python -m tests.contract.steps; do not edit -->"
END = "<!-- until here -->"
_SHARED = ("protect", "where")


def built_in() -> Iterator[Kind]:
    """Every step that comes with qlorad; those of plug-ins are left out."""
    found, _ = steps().all()
    return (kind for kind in found if kind.is_ours)


def table() -> str:
    """All steps, in Markdown."""
    lines = ["| step | what it does | parameter | accepted | default |", "|---|---|---|---|---|"]
    for kind in built_in():
        name, does = f"`{kind.name}`", kind.description
        for parameter, rules in kind.schema["properties"].items():
            told = f"`{parameter}`" + ("" if parameter in _SHARED else f": {rules['description']}")
            lines.append(f"| {name} | {does} | {told} | {_accepted(rules)} | {_default(rules)} |")
            name = does = ""
    return "\n".join(lines)


def _accepted(rules: Mapping[str, Any]) -> str:
    choices = rules.get("enum") or rules.get("items", {}).get("enum")
    if choices:
        named = ", ".join(f"`{c}`" for c in choices)
        return f"some of {named}" if rules["type"] == "array" else named
    kind = {
        "boolean": "true, false", "integer": "whole number", "number": "number", "string": "text",
        "array": "texts", "object": "text to text",
    }[rules["type"]]  # fmt: skip
    if "minimum" in rules:
        return f"{kind}, {rules['minimum']:,} to {rules['maximum']:,}"
    return kind


def _default(rules: Mapping[str, Any]) -> str:
    return f"`{json.dumps(rules['default'], ensure_ascii=False)}`" if "default" in rules else "must be given"


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the marks of the table are not in the page")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(path: pathlib.Path = PAGE) -> None:
    path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()
