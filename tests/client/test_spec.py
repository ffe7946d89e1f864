"""--set PATH=VALUE and YAML files as fields of TrainSpec."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from qlorad.cli import spec
from qlorad.errors import InvalidArgument
from qlorad.v1 import trainer_pb2 as pb

PATHS = [path for path in spec.paths(pb.TrainSpec()) if not path.endswith(".NAME")]


def filled(*words: str) -> pb.TrainSpec:
    """A TrainSpec after --set of some words."""
    train = pb.TrainSpec()
    spec.fill(train, spec.words(words))
    return train


def leaf(path: str) -> tuple[FieldDescriptor, bool]:
    """The field at the end of a path, and whether it is a list."""
    descriptor: Any = pb.TrainSpec.DESCRIPTOR
    for name in path.split("."):
        field = descriptor.fields_by_name[name]
        descriptor = field.message_type
    if descriptor is not None:
        field = descriptor.fields[0]
    return field, field.is_repeated


def test_values_are_typed_by_the_proto() -> None:
    train = filled(
        "lora.rank=8", "lora.dropout=0.5", "lora.target_modules=q_proj, v_proj", "data.packing=no",
        "quantization.method=nf4", "optimizer.kind=OPTIMIZER_KIND_ADAMW", "optimizer.learning_rate=5e-3",
        "model=models/x", "limits.max_seconds=1_000", "data.over_length=truncate",
    )  # fmt: skip
    assert train.lora.rank == 8 and train.lora.dropout == 0.5
    assert list(train.lora.target_modules.names) == ["q_proj", "v_proj"]
    assert train.data.HasField("packing") and train.data.packing is False
    assert train.quantization.method == pb.QUANTIZATION_METHOD_NF4
    assert train.optimizer.kind == pb.OPTIMIZER_KIND_ADAMW and train.optimizer.learning_rate == 5e-3
    assert train.limits.max_seconds == 1000 and train.model == "models/x"


def test_the_inner_list_may_be_named_too() -> None:
    assert list(filled("lora.target_modules.names=all-linear").lora.target_modules.names) == ["all-linear"]


def test_parameters_of_a_plugin_go_by_their_own_names() -> None:
    train = filled("objective.name=focal", "objective.parameters.gamma=2", "objective.parameters.how=as a text")
    assert dict(train.objective.parameters) == {"gamma": 2, "how": "as a text"}
    tree = {"objective": {"parameters": {"gamma": 0.5, "on": True, "terms": {"a": "b"}, "names": ["x", "y"]}}}
    told = pb.TrainSpec()
    spec.fill(told, spec.leaves(tree))
    assert told.objective.parameters["gamma"] == 0.5 and told.objective.parameters["on"] is True
    assert dict(told.objective.parameters["terms"]) == {"a": "b"}
    assert list(told.objective.parameters["names"]) == ["x", "y"]
    with pytest.raises(InvalidArgument, match=r"accepted: objective\.parameters\.NAME"):
        filled("objective.parameters=3")
    with pytest.raises(InvalidArgument, match="a number, true or false"):
        spec.fill(pb.TrainSpec(), [("objective.parameters.x", object())])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("lora.rnak=8", "did you mean lora.rank"),
        ("rank=8", "did you mean lora.rank"),
        ("lora=8", "is a group of settings; accepted: lora.rank"),
        ("lora.rank.x=8", "no such setting"),
        ("lora.rank=eight", "got 'eight'; accepted: a whole number"),
        ("lora.rank=-1", "got '-1'; accepted: a whole number from 0"),
        ("lora.rank=99999999999", "accepted: a number that the field can hold"),
        ("data.packing=maybe", "got 'maybe'; accepted: true or false"),
        ("schedule.kind=cosin", "got 'cosin'; accepted: constant, linear, cosine"),
        ("schedule.kind=unspecified", "accepted: constant, linear, cosine"),
        ("optimizer.learning_rate=fast", "accepted: a number"),
        ("lora.target_modules=", "accepted: a list"),
        ("lora.rank", "accepted: a whole number"),
    ],
)
def test_what_is_wrong_is_told_with_what_would_do(word: str, told: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        filled(word)
    assert told in str(wrong.value)
    assert [v.field for v in wrong.value.violations] == [word.partition("=")[0]]


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as wrong:
        filled("lora.rnak=8", "data.packing=perhaps", "lora.rank=4", "seed=x")
    assert [v.field for v in wrong.value.violations] == ["lora.rnak", "data.packing", "seed"]


@given(st.sampled_from(PATHS), st.data())
def test_every_path_takes_a_value_of_its_type_and_no_other_field_moves(path: str, data: st.DataObject) -> None:
    field, repeated = leaf(path)
    value: Any
    if repeated:
        value = data.draw(st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3))
        text = ",".join(value)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        value = data.draw(st.booleans())
        text = str(value).lower()
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        chosen: Any = data.draw(st.sampled_from([v for v in field.enum_type.values if v.number]))
        value, text = chosen.number, chosen.name
    elif field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        value = data.draw(st.floats(allow_nan=False, allow_infinity=False))
        text = repr(value)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        value = data.draw(st.from_regex(r"[a-z0-9/=.:-]{1,20}", fullmatch=True))
        text = value
    else:
        value = data.draw(st.integers(0, 2**32 - 1))
        text = str(value)
    train = filled(f"{path}={text}")
    target: Any = train
    for name in path.split("."):
        target = getattr(target, name)
    assert (list(getattr(target, "names", target)) if repeated else target) == value
    assert len(train.ListFields()) == 1


def test_a_tree_is_its_leaves() -> None:
    tree = {"lora": {"rank": 4, "target_modules": ["q_proj"]}, "seed": 3, "data": {"packing": True}}
    train = pb.TrainSpec()
    spec.fill(train, spec.leaves(tree), "--file")
    assert train.lora.rank == 4 and list(train.lora.target_modules.names) == ["q_proj"]
    assert train.seed == 3 and train.data.packing is True
    assert len(PATHS) > 30
