"""Pipelines through the door: listed, checked, applied, told in stats and lineage; plug-ins, whole and broken."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc
from tests.datasets.kit import Door, jsonl, numbered, refusal
from tests.house import ROOT, house
from tests.plugins import install, plugin

PLUGIN = ROOT / "examples" / "plugin-steps"
ERROR = datasets_pb2.SEVERITY_ERROR


def step(name: str, **parameters: object) -> datasets_pb2.Step:
    asked = datasets_pb2.Step(name=name)
    asked.parameters.update(parameters)
    return asked


FRAGILE = '''
"""Steps that go wrong."""
from dataclasses import dataclass
from services.datasets.worker.steps import api


@dataclass(frozen=True)
class Trips:
    """Raises on some rows."""
    over: str = api.parameter(help="what it trips over")

    def apply(self, example):
        example["chat"]["messages"].append({"role": "ROLE_USER"})
        if self.over in str(example):
            raise RuntimeError("the row said " + self.over)
        example["chat"]["messages"].pop()
        return example


@dataclass(frozen=True)
class Babbles:
    """Returns what is no example."""
    how: str = api.parameter("text", help="which nonsense")

    def apply(self, example):
        nonsense = {"text": "x", "empty": {}, "set": {"chat": {1, 2}}, "body": {"chat": {"words": []}}}
        return nonsense.get(self.how, self.how)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where plug-ins are installed for the daemon."""
    site = tmp_path_factory.mktemp("site")
    install(PLUGIN, site)
    fragile = plugin(
        tmp_path_factory.mktemp("fragile"), "fragile-steps", FRAGILE, "qlorad.steps", trips="Trips", babbles="Babbles"
    )
    install(fragile, site)
    return site


@pytest.fixture(scope="module")
def plugged(site: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A daemon whose environment has plug-ins."""
    with house(tmp_path_factory.mktemp("plugged") / "home") as h:
        h.start("datasets", environ={"PYTHONPATH": str(site)})
        yield Door(h, datasets_pb2_grpc.DatasetServiceStub(h.channel("datasets")))


def steps_of(door: Door) -> dict[str, datasets_pb2.StepKind]:
    listed = door.stub.ListSteps(datasets_pb2.ListStepsRequest(), timeout=60).steps
    assert [s.name for s in listed] == sorted(s.name for s in listed)
    return {s.name: s for s in listed}


def test_steps_are_listed_with_their_parameters(door: Door) -> None:
    listed = steps_of(door)
    assert {"citations", "notation", "unicode", "whitespace", "redact", "sample", "as_text"} <= set(listed)
    told = listed["min_words"]
    assert told.package.startswith("qlorad-services ") and "words" in told.description
    schema = json.loads(told.parameters_schema_json)
    assert schema["properties"]["min_words"]["minimum"] == 1 and schema["required"] == ["min_words"]


def test_a_pipeline_is_applied_counted_and_told(door: Door) -> None:
    rows = [
        {"instruction": "What binds?", "input": "", "output": "TP53  binds DNA [1, 2]  (Lee et al., 2020)."},
        {"instruction": "And then?", "input": "", "output": "IL-6 and α-synuclein do too."},
        {"instruction": "Short?", "input": "", "output": "Yes [3]."},
    ]
    steps = [step("citations"), step("whitespace"), step("min_words", min_words=2)]
    made = door.make("stepped", jsonl(rows), steps=steps)
    assert [r["output"] for r in door.export("datasets/stepped", datasets_pb2.ROW_FORMAT_INSTRUCTION)] == [
        "TP53 binds DNA.", "IL-6 and α-synuclein do too."
    ]  # fmt: skip
    stats = made.stats
    assert dict(stats.changed_by_step) == {"0:citations": 2, "1:whitespace": 1}
    assert dict(stats.dropped_by_step) == {"2:min_words": 1} and stats.rows["train"] == 2 and not stats.skipped_rows
    assert dict(stats.forms) == {"instruction": 2}
    applied = made.lineage.steps
    assert [a.step.name for a in applied] == ["citations", "whitespace", "min_words"]
    assert applied[1].step.parameters["empty_lines"] == 1 and applied[0].package.startswith("qlorad-services ")


def test_rows_that_change_their_form_are_counted_as_what_they_became(door: Door) -> None:
    made = door.make("as-text", jsonl(numbered(5)), steps=[step("as_text", prompt="{prompt}\n", plain=True)])
    assert dict(made.stats.forms) == {"text": 5}
    assert door.export("datasets/as-text")[0]["completion"] == {"completion": "Say 0.\nIt is 0."}


def test_a_step_that_leaves_nothing_to_learn_is_an_error_of_the_row(door: Door) -> None:
    rows = [*numbered(2), {"instruction": "Who?", "input": "", "output": "<b></b>"}]
    refused = refusal(lambda: door.make("emptied", jsonl(rows), steps=[step("strip_tags")]))
    assert refused.reason == "INVALID_REQUEST" and "empty_output" in refused.violations[0][1]


def test_wrong_steps_are_refused_at_once_and_by_name(door: Door) -> None:
    steps = [step("citaitons"), step("min_words", min_words=-1, words=3)]
    refused = refusal(lambda: door.make("wrong-steps", jsonl(numbered(3)), steps=steps))
    assert refused.code == "INVALID_ARGUMENT"
    assert sorted(refused.fields) == ["steps[0].name", "steps[1].parameters.min_words", "steps[1].parameters.words"]
    assert "nearest citations" in dict(refused.violations)["steps[0].name"]
    plan = door.request("", jsonl(numbered(3)), steps=steps)
    asked = datasets_pb2.ValidateDatasetRequest(plan=plan)
    assert "plan.steps[0].name" in refusal(lambda: list(door.stub.ValidateDataset(asked, timeout=60))).fields


def test_the_example_plug_in_is_listed_and_applied(plugged: Door) -> None:
    listed = steps_of(plugged)
    assert listed["replace_terms"].package == "qlorad-example-steps 1.0.0"
    assert json.loads(listed["drop_phrases"].parameters_schema_json)["required"] == ["phrases"]
    rows = [*numbered(3), {"instruction": "Say x.", "input": "", "output": "As a Language Model I can not."}]
    steps = [step("drop_phrases", phrases=["as a language model"]), step("replace_terms", terms={"It": "That"})]
    made = plugged.make("plugged", jsonl(rows), steps=steps)
    assert [r["output"] for r in plugged.export("datasets/plugged", datasets_pb2.ROW_FORMAT_INSTRUCTION)] == [
        f"That is {i}." for i in range(3)
    ]
    assert dict(made.stats.dropped_by_step) == {"0:drop_phrases": 1}
    assert made.lineage.steps[1].package == "qlorad-example-steps 1.0.0"
    assert made.lineage.steps[1].step.parameters["where"] == "all"


def test_a_step_that_raises_costs_its_row_and_tells_no_inside_story(plugged: Door) -> None:
    steps = [step("trips", over="It is 2.")]
    refused = refusal(lambda: plugged.make("trips-refused", jsonl(numbered(5)), steps=steps))
    assert refused.fields == ["rows.jsonl:3 steps[0:trips]"]
    told = refused.violations[0][1]
    assert "failed with RuntimeError" in told and "fragile-steps 0.1" in told and "the row said" not in str(refused)
    made = plugged.make("trips", jsonl(numbered(5)), steps=steps, on_row_error=datasets_pb2.ON_ROW_ERROR_SKIP)
    assert made.stats.rows["train"] == 4 and made.stats.skipped_rows == 1 and not made.stats.changed_by_step
    found = [f for f in plugged.findings("datasets/trips", ERROR) if f.rule == "step_failed"]
    assert [(f.line, f.row) for f in found] == [(3, 3)]
    log = (plugged.home / "logs" / "datasets-ingest.log").read_text()
    assert "0:trips of fragile-steps 0.1 failed" in log and "the row said It" not in log


@pytest.mark.parametrize("how", ["text", "empty", "set", "body", "something"])
def test_what_a_plug_in_returns_is_not_believed(plugged: Door, how: str) -> None:
    refused = refusal(lambda: plugged.make(f"babbles-{how}", jsonl(numbered(1)), steps=[step("babbles", how=how)]))
    assert "returned what is no example" in refused.violations[0][1]


def test_a_broken_plug_in_is_named_where_it_matters(plugged: Door, site: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = steps_of(plugged)
    lost = plugin(tmp_path / "lost", "lost-steps", "import no_such_module_here\n", "qlorad.steps", lost="Lost")
    idle = plugin(
        tmp_path / "idle", "idle-steps", "class Idle:\n    pass\n", "qlorad.steps", idle="Idle", citations="Idle"
    )
    install(lost, site)
    install(idle, site)
    refused = refusal(lambda: steps_of(plugged))
    assert refused.reason == "WORKER_LOST"
    assert "'lost' of lost-steps 0.1 cannot be loaded: ModuleNotFoundError of 'no_such_module_here'" in refused.message
    assert "'idle' of idle-steps 0.1 is no step: not a dataclass" in refused.message
    assert "'citations' of idle-steps 0.1 has the name of a step that is built in" in refused.message

    assert plugged.make("beside-broken", jsonl(numbered(2)), steps=[step("replace_terms", terms={"Say": "Tell"})])
    named = refusal(lambda: plugged.make("with-broken", jsonl(numbered(2)), steps=[step("lost"), step("citations")]))
    assert named.code == "INVALID_ARGUMENT" and named.fields == ["steps[0].name", "steps[1].name"]
    assert "lost-steps 0.1" in named.violations[0][1] and "idle-steps 0.1" in named.violations[1][1]

    for package in ("lost_steps", "idle_steps"):
        shutil.rmtree(site / f"{package}-0.1.dist-info")
    assert steps_of(plugged) == whole
