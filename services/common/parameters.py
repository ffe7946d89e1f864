"""Parameters of a plug-in: declared as fields of a dataclass, told as JSON Schema, checked by it.

Law of this room: pure. What the schema tells is what is checked, nothing more
and nothing less; all violations are found at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import struct_pb2

from services.common.errors import Violation, show

_RULES = "qlorad"
_KINDS: Mapping[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    tuple[str, ...]: {"type": "array", "items": {"type": "string"}},
    Mapping[str, str]: {"type": "object", "additionalProperties": {"type": "string"}},
}
_WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a text"}


def parameter(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field of a plug-in that a request may set.

    Its type is one of bool, int, float, str, tuple[str, ...] and
    Mapping[str, str]. Without a default it must be given. `choices` are what a
    text, or each text of a tuple, may be; `minimum` and `maximum` bound numbers,
    the length of texts and tuples, and the entries of mappings.
    """
    rules = {"help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={_RULES: rules})
    return dataclasses.field(default=default, metadata={_RULES: rules})


def schema_of(kind: type, method: str) -> dict[str, Any]:
    """The JSON Schema of a plug-in's parameters; TypeError where the class is none with such a method."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise TypeError("not a dataclass")
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError("not frozen: it keeps no state from one call to the next")
    if not callable(getattr(kind, method.partition("(")[0], None)):
        raise TypeError(f"has no method {method}")
    hints = typing.get_type_hints(kind)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        rules = field.metadata.get(_RULES)
        if rules is None:
            raise TypeError(f"the field {field.name} is not declared with parameter()")
        if hints[field.name] not in _KINDS:
            raise TypeError(f"the parameter {field.name} is of a type that none may have")
        properties[field.name] = _property(_KINDS[hints[field.name]], rules)
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = _told(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            properties[field.name]["default"] = field.default_factory()
        else:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _property(kind: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {**kind, "description": rules["help"]}
    if rules["choices"]:
        if kind["type"] == "array":
            told["items"] = {"type": "string", "enum": list(rules["choices"])}
        else:
            told["enum"] = list(rules["choices"])
    least, most = {
        "string": ("minLength", "maxLength"),
        "array": ("minItems", "maxItems"),
        "object": ("minProperties", "maxProperties"),
    }.get(kind["type"], ("minimum", "maximum"))
    if rules["minimum"] is not None:
        told[least] = rules["minimum"]
    if rules["maximum"] is not None:
        told[most] = rules["maximum"]
    return told


def _told(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def values(schema: Mapping[str, Any], given: struct_pb2.Struct, path: str) -> tuple[dict[str, Any], list[Violation]]:
    """Every parameter, defaults too, and every violation."""
    wrong: list[Violation] = []
    known = schema["properties"]
    found: dict[str, Any] = {}
    for name in given.fields:
        value = _value(given.fields[name])
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            accepted = f"one of {', '.join(known)}" if known else "no parameter: it has none"
            nearest = f"nearest {close[0]}; " if close else ""
            wrong.append(Violation(f"{path}.{name}", show(value), nearest + accepted))
            continue
        accepted = _against(known[name], value)
        if accepted:
            wrong.append(Violation(f"{path}.{name}", show(value), accepted))
        found[name] = int(value) if known[name]["type"] == "integer" and not accepted else value
    for name, rules in known.items():
        if name in found:
            continue
        if "default" in rules:
            found[name] = rules["default"]
        else:
            wrong.append(Violation(f"{path}.{name}", "nothing", f"{_words(rules)}: {rules['description']}"))
    return {name: found[name] for name in known if name in found}, wrong


def made(kind: type, told: Mapping[str, Any]) -> Any:
    """The plug-in of checked parameters; ValueError where they do not go together."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})


def _value(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {k: _value(value.struct_value.fields[k]) for k in value.struct_value.fields}
    if kind == "list_value":
        return [_value(v) for v in value.list_value.values]
    if kind in (None, "null_value"):
        return None
    found = getattr(value, kind)
    if kind == "number_value" and math.isfinite(found) and found.is_integer() and abs(found) <= 1 << 53:
        return int(found)
    return found


def _against(rules: Mapping[str, Any], value: Any) -> str:
    """What would be accepted instead; empty where the value is right."""
    return "" if _fits(rules, value) else _words(rules)


def _fits(rules: Mapping[str, Any], value: Any) -> bool:
    kind = rules["type"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        right = isinstance(value, int) if kind == "integer" else isinstance(value, int | float)
        if not right or isinstance(value, bool) or not math.isfinite(value):
            return False
        return bool(rules.get("minimum", -math.inf) <= value <= rules.get("maximum", math.inf))
    if kind == "string":
        if not isinstance(value, str) or value not in rules.get("enum", (value,)):
            return False
        return bool(rules.get("minLength", 0) <= len(value) <= rules.get("maxLength", math.inf))
    if kind == "array":
        if not isinstance(value, list) or not all(_fits({"type": "string", **rules["items"]}, v) for v in value):
            return False
        return bool(rules.get("minItems", 0) <= len(value) <= rules.get("maxItems", math.inf))
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        return False
    return bool(rules.get("minProperties", 0) <= len(value) <= rules.get("maxProperties", math.inf))


def _words(rules: Mapping[str, Any]) -> str:
    kind = rules["type"]
    if "enum" in rules:
        return f"one of {', '.join(rules['enum'])}"
    if kind == "array":
        inner = rules["items"].get("enum")
        return (f"a list of {', '.join(inner)}" if inner else "a list of texts") + _bounds(rules, "Items")
    if kind == "object":
        return "an object of texts" + _bounds(rules, "Properties")
    if kind == "string":
        return _WORDS[kind] + _bounds(rules, "Length")
    least, most = rules.get("minimum"), rules.get("maximum")
    if least is None and most is None:
        return _WORDS[kind]
    if most is None:
        return f"{_WORDS[kind]}, {least} or more"
    return f"{_WORDS[kind]}, " + (f"{most} or less" if least is None else f"{least} to {most}")


def _bounds(rules: Mapping[str, Any], of: str) -> str:
    unit = {"Items": "entries", "Properties": "entries", "Length": "characters"}[of]
    least, most = rules.get(f"min{of}"), rules.get(f"max{of}")
    if least is None and most is None:
        return ""
    if most is None:
        return f" of {least} or more {unit}"
    return f" of at most {most} {unit}" if not least else f" of {least} to {most} {unit}"
