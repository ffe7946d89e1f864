"""Canonical rows from strangers: qlorad.v1.Example as JSON, believed only after a look at each field.

Law of this room: pure. What passes is the plain form that this system would
have made itself; what the contract does not know is refused by name.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from qlorad.v1 import datasets_pb2
from services.datasets.worker import chat
from services.datasets.worker.found import clip
from services.datasets.worker.plain import BODIES, Plain, body_of, conversations
from services.datasets.worker.row import Row

_ACCEPTED = "a qlorad.v1.Example as JSON, as an export writes it"


def example(row: Row, metadata: Any) -> Plain:
    """The plain example of a canonical row; `metadata` is the row's, made plain."""
    body = {k: v for k, v in row.given.items() if k != "metadata"}
    row.rest.clear()
    try:
        read = json_format.ParseDict(body, datasets_pb2.Example())
    except (json_format.ParseError, ValueError, RecursionError) as e:
        row.wrong("not_canonical", str(e), _ACCEPTED, "")
        return {}
    made: Plain = json_format.MessageToDict(read, preserving_proto_field_name=True)
    if not body_of(made):
        row.wrong("missing_field", "there is no body", f"one of {', '.join(BODIES)}", "")
        return {}
    if isinstance(metadata, dict):
        if metadata:
            made["metadata"] = metadata
    elif metadata is not None:
        row.wrong("wrong_type", f"is {clip(metadata)}", "an object", "metadata")
    _check(made, row)
    return made


def _check(made: Plain, row: Row) -> None:
    for path, messages in conversations(made):
        for i, message in enumerate(messages):
            where = f"{path}[{i}]"
            if "role" not in message:
                row.wrong("unknown_role", "there is no role", "ROLE_USER, ROLE_ASSISTANT, …", f"{where}.role")
            if any("text" not in part for part in message.get("parts", ())):
                row.wrong("wrong_type", "a part holds no text", '{"text": …}', f"{where}.parts")
            for j, call in enumerate(message.get("tool_calls", ())):
                _function(call, "arguments_json", f"{where}.tool_calls[{j}]", row)
                call.setdefault("arguments_json", "{}")
    preference = made.get("preference", {})
    for i, tool in enumerate(made.get("chat", preference.get("prompt", {})).get("tools", ())):
        _function(tool, "parameters_json", f"tools[{i}]", row)
    if preference.get("plain") and [[m.get("role") for m in said] for _, said in conversations(made)] != [
        ["ROLE_USER"],
        ["ROLE_ASSISTANT"],
        ["ROLE_ASSISTANT"],
    ]:
        row.wrong("wrong_type", "plain texts are one user turn and two answers", "plain: false", "preference.plain")


def _function(told: Plain, field: str, where: str, row: Row) -> None:
    if not told.get("name"):
        row.wrong("missing_field", "the name is empty", "the function's name", f"{where}.name")
        told["name"] = ""
    if field in told:
        told[field] = chat.object_text(told[field], f"{where}.{field}", row)
