"""Runs shipped functions in a process of its own: `python -I run_functions.py SECONDS`, rows in, faults out.

Law of this room: it knows nothing of this repository. It may be killed at any
row; memory, files and processor time are bounded, and a row that runs too long
is told like any other fault.
"""

from __future__ import annotations

import ast
import doctest
import json
import resource
import signal
import sys
from types import FrameType
from typing import Any

MEMORY_BYTES = 1 << 30


class TooLong(BaseException):
    """A row took more processor time than it may; no `except Exception` of a row swallows it."""


def too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong("ran too long")


def check(row: dict[str, str]) -> str:
    """What is wrong with a row; "" where its example and its doctest give what the row states."""
    space: dict[str, Any] = {}
    exec(compile(row["output"], "row", "exec"), space)
    given = repr(eval(row["example"], space))
    if given != row["expected"]:
        return f"{row['example']} gives {given}, not {row['expected']}"
    name = [node.name for node in ast.parse(row["output"]).body if isinstance(node, ast.FunctionDef)][-1]
    if name not in row["example"]:
        return f"the example does not use {name}"
    (shown,) = doctest.DocTestFinder(recurse=False).find(space[name], name, globs=space)
    if [e.source.strip() for e in shown.examples] != [row["example"]]:
        return "the docstring shows another example"
    if doctest.DocTestRunner(verbose=False).run(shown, out=lambda _: None) != (0, 1):
        return "the doctest fails"
    return ""


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    signal.signal(signal.SIGVTALRM, too_long)
    faults = {}
    for number, row in enumerate(json.load(sys.stdin)):
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            fault = check(row)
        except (Exception, TooLong) as e:
            fault = f"{type(e).__name__}: {e}"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if fault:
            faults[number] = fault
    print(json.dumps(faults))


if __name__ == "__main__":
    main()
