"""A glance at the texts of a row: most rows hold nothing that needs to be told.

Law of this room: pure. One look at all texts together decides whether the rules
for secrets, personal data and odd characters look at each of them.
"""

from __future__ import annotations

from services.datasets.worker import characters, private
from services.datasets.worker.found import Problem
from services.datasets.worker.plain import Plain, texts


def is_worth_a_look(data: bytes) -> bool:
    """Whether any rule about texts may speak, but that about blanks at their ends: given texts as UTF-8."""
    return characters.is_worth_a_look(data) or private.is_worth_a_look(data)


def look(example: Plain) -> list[Problem]:
    """What the rules about texts say of a row."""
    has_blanks = False
    if "chat" in example:
        joined = ""
        for message in example["chat"].get("messages", ()):
            if "parts" in message:
                parts = message["parts"]
                text = parts[0]["text"] if len(parts) == 1 else "".join([p["text"] for p in parts])
                # Every ASCII blank comes before all that is written.
                if text[:1] <= " " or text[-1] <= " ":
                    has_blanks = True
                joined += text + "\n"
            if len(message) > 2:
                for call in message.get("tool_calls", ()):
                    joined += call.get("arguments_json", "") + "\n"
    else:
        joined = "\n".join([text for _, text in texts(example)])
        has_blanks = "preference" in example
    data = joined.encode()
    problems: list[Problem] = []
    if characters.is_worth_a_look(data):
        problems += characters.scan(example)
    if has_blanks:
        problems += characters.outer_blanks(example)
    if private.is_worth_a_look(data):
        problems += private.scan(example)
    return problems
