"""Makes the table in docs/formats.md of what each form of rows cannot carry, by asking the code.

`python -m tests.contract.formats` writes it (`make proto` does too);
tests/datasets/test_formats.py holds the page against the code.
"""

from __future__ import annotations

import pathlib
from typing import Any

from services.datasets.forms import FORMS, NAMES
from services.datasets.losses import CannotCarry
from services.datasets.writing import Plain, write
from tests.house import ROOT

PAGE = ROOT / "docs" / "formats.md"
BEGIN = "<!-- made by python -m tests.contract.formats; do not edit -->"
END = "<!-- until here -->"


def _said(role: str, *texts: str, **more: Any) -> Plain:
    return {"role": f"ROLE_{role}", "parts": [{"text": t} for t in texts], **more}


_ASKED, _ANSWERED = _said("USER", "a"), _said("ASSISTANT", "b")
_CALL = {"name": "f", "arguments_json": "{}", "id": "c1"}


def _chat(*messages: Plain, **more: Any) -> Plain:
    return {"chat": {"messages": list(messages), **more}}


EXAMPLES: dict[str, Plain] = {
    "one question, one answer": _chat(_ASKED, _ANSWERED),
    "… after a system turn": _chat(_said("SYSTEM", "s"), _ASKED, _ANSWERED),
    "… the question in two parts, as instruction and input": _chat(_said("USER", "a", "\n\nc"), _ANSWERED),
    "… a text in other parts": _chat(_ASKED, _said("ASSISTANT", "b", "c")),
    "… with tools on offer": _chat(_ASKED, _ANSWERED, tools=[{"name": "f"}]),
    "… with the name of a speaker": _chat({**_ASKED, "name": "n"}, _ANSWERED),
    "several questions, each with an answer": _chat(_ASKED, _ANSWERED, _ASKED, _ANSWERED),
    "a chat that ends with a question": _chat(_ASKED, _ANSWERED, _ASKED),
    "tool calls and what tools answered": _chat(
        _ASKED,
        _said("ASSISTANT", "b", tool_calls=[_CALL]),
        _said("TOOL", "c", tool_call_id="c1"),
        _ANSWERED,
        tools=[{"name": "f"}],
    ),
    "prompt and completion": {"completion": {"prompt": "a", "completion": "b"}},
    "plain text": {"completion": {"completion": "b"}},
    "preference between texts": {
        "preference": {
            "prompt": {"messages": [_ASKED]},
            "chosen": [_ANSWERED],
            "rejected": [_said("ASSISTANT", "c")],
            "plain": True,
        }
    },
    "preference between messages": {
        "preference": {
            "prompt": {"messages": [_ASKED]},
            "chosen": [_ANSWERED],
            "rejected": [_said("ASSISTANT", "c")],
        }
    },
    "… whose prompt holds answers": {
        "preference": {
            "prompt": {"messages": [_ASKED, _ANSWERED, _ASKED]},
            "chosen": [_ANSWERED],
            "rejected": [_said("ASSISTANT", "c")],
        }
    },
    "a gap to be filled": {"infill": {"prefix": "a", "middle": "b", "suffix": "c"}},
}


def _cell(example: Plain, form: Any) -> str:
    try:
        _, losses = write(example, form)
    except CannotCarry:
        return "no"
    grave = sorted({loss.field for loss in losses})
    return "loses " + ", ".join(f"`{f}`" for f in grave) if grave else "yes"


def table() -> str:
    """The table, in Markdown."""
    forms = list(FORMS)
    lines = ["| example | " + " | ".join(NAMES[f] for f in forms) + " |", "|---|" + "---|" * len(forms)]
    for told, example in EXAMPLES.items():
        lines.append(f"| {told} | " + " | ".join(_cell(example, f) for f in forms) + " |")
    return "\n".join(lines)


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
