"""Random messages of the contract, from their descriptors: mostly odd, sometimes near to right."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

NAMES = (
    "", "base", "adapters/ada", "adapters/bob", "adapters/none", "models/starter-test", "models/none", "presets/none",
    "presets/review-code", "adapters/../x", "adapters/", "ada", "sha256:", "adapters/sha256:" + "0" * 64, "x" * 300,
    "\x00", "adapters/ÿ", "models/base",
)  # fmt: skip
texts = st.one_of(
    st.sampled_from(NAMES), st.text(max_size=40), st.sampled_from(["{input}", "\u202e", "🙂" * 9, "x" * 5000, "{}"])
)
reals = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -0.0, math.nan, math.inf, 1e-310, 2.0]))


def anything(descriptor: Descriptor, depth: int = 5) -> st.SearchStrategy[Message]:
    """A message of a type, its fields set at random; enums may hold numbers that nobody knows."""
    kind = message_factory.GetMessageClass(descriptor)
    fields = [f for f in descriptor.fields if depth > 0 or f.message_type is None]
    drawn = st.fixed_dictionaries({}, optional={f.name: _value(f, depth) for f in fields})
    return drawn.map(lambda told: kind(**told))


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = _single(field, depth)
    return st.lists(one, max_size=4) if field.is_repeated else one


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if field.message_type is not None:
        return anything(field.message_type, depth - 1)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return texts
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return reals
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.sampled_from([*(v.number for v in field.enum_type.values), 77])
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return st.one_of(st.integers(max(low, -12), 40), st.integers(low, high))
