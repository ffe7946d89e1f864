"""docs/quality.md tells every rule that the code can name, as the code has it."""

from __future__ import annotations

import re

from services.datasets.repairs import REPAIRS
from services.datasets.worker.private import KINDS
from tests.contract.rules import INDIRECT, PAGE, in_code, in_page


def test_every_rule_stands_in_the_page_with_its_severity_and_repair() -> None:
    code, indirect = in_code()
    page = in_page()
    assert len(code) >= 70
    assert indirect == set(INDIRECT), "a rule is named by a variable in another file: see tests/contract/rules.py"
    assert set(page) == set(code)
    for rule, told in code.items():
        assert page[rule] == (told.severities, told.repairs), rule


def test_every_repair_and_every_kind_of_private_data_stands_in_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    repairs = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", text.partition("## Repairs")[2], re.M))
    assert list(repairs.items()) == list(REPAIRS.items())
    kinds = re.findall(r"^\| `\[([\w -]+)\]` \| `(\w+)` \|", text, re.M)
    assert kinds == list(dict.fromkeys((kind.name, kind.rule) for kind in KINDS))
