"""Words of a command line (`lora.rank=8`) and of a YAML file as fields of a proto message.

Law of this room: pure; the proto's own descriptor says what fields there are
and of what type. Every wrong path and value is reported at once, with near matches.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from qlorad.errors import InvalidArgument, Violation

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_REALS = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def fill(message: Message, given: Iterable[tuple[str, Any]], option: str = "--set") -> None:
    """Sets every (path, value) on the message, or raises InvalidArgument with all that is wrong."""
    wrong: list[Violation] = []
    for path, value in given:
        told = _set(message, path, value)
        if told:
            wrong.append(Violation(path, told))
    if wrong:
        raise InvalidArgument(
            "; ".join(f"{option} {v.field}: {v.description}" for v in wrong), reason="INVALID_REQUEST", violations=wrong
        )


def words(given: Iterable[str]) -> list[tuple[str, str]]:
    """PATH=VALUE words as pairs; a word without "=" has no value and is found wrong by `fill`."""
    return [(path, value) for path, _, value in (word.partition("=") for word in given)]


def leaves(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as (path, value) pairs."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{before}.{key}" if before else str(key)
        if isinstance(value, Mapping):
            found += leaves(value, path)
        else:
            found.append((path, value))
    return found


def paths(message: Message, before: str = "") -> list[str]:
    """Every path that can be set, in order of the proto."""
    return _paths(message.DESCRIPTOR, before)


def _paths(descriptor: Any, before: str) -> list[str]:
    found: list[str] = []
    for field in descriptor.fields:
        path = f"{before}.{field.name}" if before else field.name
        if _is_free(field):
            found.append(f"{path}.NAME")
        elif _list_inside(field) is not None or field.message_type is None:
            found.append(path)
        else:
            found += _paths(field.message_type, path)
    return found


def _is_free(field: FieldDescriptor) -> bool:
    """Whether a field holds values under names of their own, as parameters of a plug-in."""
    return field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct"


def _list_inside(field: FieldDescriptor) -> FieldDescriptor | None:
    """The one repeated field of a message that is but a list, as TargetModules is."""
    inner = field.message_type
    if inner is not None and len(inner.fields) == 1 and inner.fields[0].is_repeated:
        return inner.fields[0]
    return None


def _set(message: Message, path: str, value: Any) -> str:
    """Sets one field; returns what is wrong, or nothing."""
    names = path.split(".")
    target: Any = message
    for depth, name in enumerate(names):
        field = target.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            return _unknown(message, path)
        if _is_free(field):
            return _set_free(getattr(target, name), names[depth + 1 :], value, path)
        listed = _list_inside(field)
        last = depth == len(names) - 1
        if last and listed is not None:
            target, field = getattr(target, name), listed
        elif field.message_type is not None:
            if last:
                inner = ", ".join(f"{path}.{f.name}" for f in field.message_type.fields)
                return f"is a group of settings; accepted: {inner}"
            target = getattr(target, name)
            continue
        elif not last:
            return _unknown(message, path)
        try:
            _assign(target, field, value)
        except ValueError as e:
            return f"got {value!r}; accepted: {e}"
    return ""


def _set_free(target: Any, names: list[str], value: Any, path: str) -> str:
    if not names or not all(names):
        return f"holds values by name; accepted: {path.rstrip('.')}.NAME"
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # what is no JSON is a text
            value = json.loads(value)
    for name in names[:-1]:
        target = target.get_or_create_struct(name)
    try:
        target[names[-1]] = value
    except ValueError:
        return f"got {value!r}; accepted: a number, true or false, a text, or a list of them"
    return ""


def _unknown(message: Message, path: str) -> str:
    known = paths(message)
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    last = path.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == last and k not in near]
    return "no such setting" + (f"; did you mean {' or '.join(near)}?" if near else f"; accepted: {', '.join(known)}")


def _assign(target: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        items = value if isinstance(value, list) else [v.strip() for v in str(value).split(",") if v.strip()]
        if not items:
            raise ValueError("a list, as in q_proj,v_proj")
        parsed = [_parse(field, item) for item in items]
        del getattr(target, field.name)[:]
        getattr(target, field.name).extend(parsed)
        return
    try:
        setattr(target, field.name, _parse(field, value))
    except ValueError as e:
        if "out of range" in str(e).lower():
            raise ValueError("a number that the field can hold") from None
        raise


def _parse(field: FieldDescriptor, value: Any) -> Any:
    text = ("true" if value else "false") if isinstance(value, bool) else str(value).strip()
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if text.lower() not in _YES + _NO:
            raise ValueError("true or false")
        return text.lower() in _YES
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return _enum(field, text)
    if field.cpp_type in _INTEGERS:
        try:
            number = int(text.replace("_", ""))
        except ValueError:
            raise ValueError("a whole number") from None
        if number < 0 and field.cpp_type in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
            raise ValueError("a whole number from 0")
        return number
    if field.cpp_type in _REALS:
        try:
            return float(text)
        except ValueError:
            raise ValueError("a number") from None
    return text


def _enum(field: Any, text: str) -> int:
    values = {v.name: v.number for v in field.enum_type.values}
    zero = next(name for name, number in values.items() if number == 0)
    prefix = zero.removesuffix("UNSPECIFIED")
    short = {name.removeprefix(prefix).lower(): number for name, number in values.items() if number}
    wanted = text.removeprefix(prefix).lower().replace("-", "_")
    if wanted not in short:
        raise ValueError(", ".join(short))
    number: int = short[wanted]
    return number
