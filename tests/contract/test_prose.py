"""The contract says in words what it does: every call its errors, every message and enum what it is."""

from __future__ import annotations

import pathlib
import re

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import code_pb2
from grpc_tools import protoc

from qlorad.v1 import errors_pb2
from services.common import errors
from tests.house import ROOT

CODES = set(code_pb2.Code.keys())
REASONS = {name.removeprefix("REASON_") for name in errors_pb2.Reason.keys()}  # an EnumTypeWrapper
ALWAYS = {"UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """The public contract with its comments."""
    import google.rpc
    import grpc_tools

    out = tmp_path_factory.mktemp("image") / "image"
    includes = [
        ROOT / "protos",
        pathlib.Path(grpc_tools.__file__).parent / "_proto",
        pathlib.Path(next(iter(google.rpc.__path__))).parent.parent,
    ]
    names = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos" / "qlorad" / "v1").glob("*.proto"))
    arguments = ["protoc", *(f"-I{i}" for i in includes), "--include_source_info", f"--descriptor_set_out={out}"]
    assert protoc.main([*arguments, *names]) == 0
    image = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    assert len(image.file) == len(names) == 7
    return list(image.file)


def comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(at.path): at.leading_comments for at in file.source_code_info.location if at.leading_comments}


def calls(files: list[descriptor_pb2.FileDescriptorProto]) -> dict[str, tuple[str, str]]:
    """Method -> its comment and its service's."""
    found = {}
    for file in files:
        told = comments(file)
        for s, service in enumerate(file.service):
            for m, method in enumerate(service.method):
                name = f"{service.name}/{method.name}"
                found[name] = (told.get((6, s, 2, m), ""), told.get((6, s), ""))
    return found


def test_every_service_and_call_says_its_errors(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    found = calls(files)
    assert len(found) >= 30
    for name, (comment, service) in found.items():
        assert "Errors:" in comment, f"{name} says no errors"
        assert ALWAYS <= set(re.findall(r"[A-Z_]{6,}", service)), f"{name}: its service omits one"
        said = comment.partition("Errors:")[2]
        for word in re.findall(r"\b[A-Z][A-Z_]{3,}\b", said):
            known = word in CODES or word in REASONS or any(word in v for v in _enum_words(files))
            assert known, f"{name} names {word}, which is neither a code nor a reason nor an enum's value"


def _enum_words(files: list[descriptor_pb2.FileDescriptorProto]) -> list[str]:
    return [value.name for file in files for enum in file.enum_type for value in enum.value] + ["RetryInfo", "ALL"]


def test_every_message_field_enum_and_value_is_explained(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    silent, seen = [], 0
    for file in files:
        told = comments(file)
        for m, message in enumerate(file.message_type):
            seen += 1
            if (4, m) not in told:
                silent.append(message.name)
            silent += [f"{message.name}.{f.name}" for n, f in enumerate(message.field) if (4, m, 2, n) not in told]
        for e, enum in enumerate(file.enum_type):
            seen += 1
            if (5, e) not in told:
                silent.append(enum.name)
            silent += [v.name for n, v in enumerate(enum.value) if (5, e, 2, n) not in told]
            assert enum.value[0].name.endswith("_UNSPECIFIED")
    assert silent == [] and seen > 120


def test_the_code_in_brackets_is_the_one_that_is_sent(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    (file,) = [f for f in files if f.name.endswith("errors.proto")]
    told = comments(file)
    reasons = file.enum_type[0].value
    assert set(errors._CODES) == {r.number for r in reasons if r.number} and len(reasons) >= 24
    for n, reason in enumerate(reasons):
        if reason.number:
            (code,) = re.findall(r"^ ?\[([A-Z_]+)\]", told[(5, 0, 2, n)])
            assert code_pb2.Code.Value(code) == errors._CODES[reason.number], reason.name


def test_each_call_has_a_request_and_an_answer_of_its_own(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    used: list[str] = []
    for file in files:
        for service in file.service:
            for method in service.method:
                for kind, suffix in ((method.input_type, "Request"), (method.output_type, "Response")):
                    short = kind.rpartition(".")[2]
                    assert short in (f"{method.name}{suffix}", f"{service.name}{method.name}{suffix}")
                    used.append(kind)
    assert len(used) == len(set(used)) >= 60


def test_every_reason_is_documented_with_its_code() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    told = {f"REASON_{reason}": code for reason, code in rows}
    sent = {errors_pb2.Reason.Name(r): code_pb2.Code.Name(c) for r, c in errors._CODES.items()}
    assert told == sent and len(rows) == len(sent)


def test_the_tests_that_promises_name_are_there() -> None:
    named = re.findall(r"`(tests/[a-z_/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) >= 12
    for path, test in named:
        text = (ROOT / path).read_text()
        assert not test or re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), f"{path}::{test}"
