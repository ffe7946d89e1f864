"""What a dataset is to be made of, and how: words of a caller as a request.

Law of this room: pure; knows names and forms, not what the daemon accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, Unpack

from google.protobuf import json_format

from qlorad import errors
from qlorad._wire_core import enum_value, full_name
from qlorad.v1 import datasets_pb2 as pb

Step: TypeAlias = "str | Mapping[str, Any] | tuple[str, Mapping[str, Any]] | pb.Step"
"""A step: its name, {name: parameters}, (name, parameters), or a message."""


class Plan(TypedDict, total=False):
    """How a dataset is made, beside its files."""

    hub: str | pb.HubSource
    """Rows of a hub's dataset: "owner/name", "owner/name@revision", or a message with all that it can say."""
    folder: str | pb.FolderSource
    """Rows of a folder of the daemon's host."""
    urls: Sequence[str]
    """Pages and files on the web, of hosts that the daemon allows, in order."""
    chroma: tuple[str, str] | pb.ChromaSource
    """Rows of a Chroma collection: the folder of its persistent client on the daemon's host, and its name."""
    parents: Sequence[str]
    """Rows of other datasets, in order."""
    format: str | int
    columns: Mapping[str, str]
    """Field of the form to column of the file."""
    validation: float
    test: float
    """Shares set aside, drawn with the seed."""
    seed: int
    stratify_by: str
    """ "form", "language", "source" or "metadata.KEY": each kind gets its share."""
    keep_splits: bool
    """Keep the splits that the source has."""
    on_row_error: str | int
    keep_duplicates: bool
    near_duplicates: str | int
    """ "ignore", "together" or "drop"."""
    similarity: float
    """From 0.5 to 1: how similar rows are that count as near duplicates."""
    repairs: Sequence[str]
    """Names of repairs, or "all"."""
    steps: Sequence[Step]
    min_score: float
    """Papers with a lower quality score are left out and counted."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What a validation found."""

    report: pb.ValidationReport
    findings: tuple[pb.Finding, ...]


def request_of(**plan: Unpack[Plan]) -> pb.CreateDatasetRequest:
    """The request of a plan, but for its uploads and its name."""
    request = pb.CreateDatasetRequest(
        parents=[full_name("datasets", p) for p in plan.get("parents", ())],
        format=enum_value(pb.RowFormat, "ROW_FORMAT_", "format", plan.get("format", 0)),
        on_row_error=enum_value(pb.OnRowError, "ON_ROW_ERROR_", "on_row_error", plan.get("on_row_error", 0)),
        columns=plan.get("columns") or {},
        keep_duplicates=plan.get("keep_duplicates", False),
        near_duplicates=enum_value(
            pb.NearDuplicates, "NEAR_DUPLICATES_", "near_duplicates", plan.get("near_duplicates", 0)
        ),
        near_duplicate_similarity=plan.get("similarity"),
        repairs=plan.get("repairs", ()),
        steps=[step_of(s) for s in plan.get("steps", ())],
        min_score=plan.get("min_score"),
    )
    split = pb.Split(
        validation_fraction=plan.get("validation", 0.0),
        test_fraction=plan.get("test", 0.0),
        stratify_by=plan.get("stratify_by", ""),
        keep_source=plan.get("keep_splits", False),
    )
    if split.ByteSize():
        split.seed = plan.get("seed", 0)
        request.split.CopyFrom(split)
    if "hub" in plan:
        request.hub.CopyFrom(hub_of(plan["hub"]))
    if "folder" in plan:
        given = plan["folder"]
        request.folder.CopyFrom(given if isinstance(given, pb.FolderSource) else pb.FolderSource(path=str(given)))
    if "urls" in plan:
        request.web.urls.extend(plan["urls"])
    if "chroma" in plan:
        place = plan["chroma"]
        if not isinstance(place, pb.ChromaSource):
            place = pb.ChromaSource(path=str(place[0]), collection=place[1])
        request.chroma.CopyFrom(place)
    return request


def hub_of(given: str | pb.HubSource) -> pb.HubSource:
    """ "owner/name@revision" as a message."""
    if isinstance(given, pb.HubSource):
        return given
    repo, _, revision = given.partition("@")
    return pb.HubSource(repo=repo, revision=revision)


def step_of(given: Step) -> pb.Step:
    """A step as a message; INVALID_ARGUMENT where it is none."""
    if isinstance(given, pb.Step):
        return given
    if isinstance(given, str):
        return pb.Step(name=given)
    name: Any
    parameters: Any
    if isinstance(given, tuple):
        name, parameters = given
    elif set(given) <= {"name", "parameters"} and "name" in given:
        name, parameters = given["name"], given.get("parameters")
    elif len(given) == 1:
        ((name, parameters),) = given.items()
    else:
        raise errors.invalid("steps", given, "NAME, {NAME: {PARAMETER: VALUE}}, or {name: NAME, parameters: {…}}")
    step = pb.Step(name=str(name))
    try:
        json_format.ParseDict(dict(parameters or {}), step.parameters)
    except (json_format.ParseError, TypeError, ValueError):
        raise errors.invalid(f"steps {name}", parameters, "parameters by name, as in {min_words: 3}") from None
    return step
