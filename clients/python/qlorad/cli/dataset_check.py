"""`qlorad dataset validate`, `steps`: what would be found, and what can be done about it.

Law of this room: nothing is sealed but by `--fix`, which says what it repaired.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import dataset_options as given
from qlorad.cli import output as out
from qlorad.cli import parameters
from qlorad.cli.dataset_show import FINDINGS, below_score, by_step, counted, show_dataset
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.plans import Plan
    from qlorad.v1 import datasets_pb2

DOES_NOT_PASS = 2


def add_to(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("validate")(validate)
    app.command("steps")(steps)


def validate(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files; or datasets by alias or sha256:…; or one hub:OWNER/NAME, https://… or folder.",
            metavar="SOURCE…",
        ),
    ] = None,
    chroma: given.Chroma = "",
    collection: given.Collection = "",
    severity: Annotated[str, typer.Option(help="Only info, warning or error, and worse.")] = "",
    most: Annotated[int, typer.Option(min=0, help="So many findings in the table; JSON has all.")] = 50,
    fix: Annotated[bool, typer.Option("--fix", help="Make a dataset with every repair, under --name.")] = False,
    name: Annotated[str, typer.Option(help="The alias of the repaired dataset.")] = "",
    move: given.Move = False,
    format: given.FormatOf = "",
    validation: given.CheckedShare = 0.0,
    test: given.TestShare = 0.0,
    seed: given.Seed = 0,
    on_row_error: given.OnRowError = "refuse",
    column: given.Column = None,
    steps: given.Steps = None,
    repair: given.Repair = None,
    near_duplicates: given.Near = "together",
    similarity: given.Similarity = None,
    min_score: given.MinScore = None,
    output: Output = Format.table,
) -> int:
    """Checks files or datasets as upload would, and seals nothing. Exit code 2 where they do not pass."""
    from qlorad import errors
    from qlorad.cli import progress

    if fix and not name:
        raise errors.invalid("--name", name, "an alias for the repaired dataset")
    if name and not fix:
        raise errors.invalid("--name", name, "no name without --fix: validate makes nothing")
    files, others = given.told_apart(sources or [])
    if not (sources or chroma or collection):
        raise errors.invalid("SOURCE", "", "files, datasets, hub:OWNER/NAME, https://… or a folder; or --chroma")
    asked = given.plan(
        format, column, validation, test, seed, "", False, on_row_error, False, near_duplicates, similarity,
        ["all"] if fix else repair, steps, min_score,
    )  # fmt: skip
    if chroma or collection:
        given.alone(" ".join(sources or []), "", [], [])
        asked = given.elsewhere(asked, [], chroma, collection)
    if others and given.is_place(others[0]):
        asked = given.sourced(asked, others[0], "", [], [])
    with connected() as client:
        if others and not given.is_place(others[0]):
            asked = {**asked, "parents": [given.there(client, s) for s in others]}
        with progress.shown("validate") as tell:
            told = client.datasets.validate(files, min_severity=severity, progress=tell, **asked)
            found, report = _heard(output, told)
        mended = fix and (report.passes or on_row_error == "skip")
        made = _fixed(client, name, files, move, asked) if mended else None
    if output is Format.table:
        _show_findings(found, most)
        _show_report(report)
        if made is not None:
            print()
            show_dataset(output, made)
        elif fix:
            out.say(
                "no dataset was made: no repair mends these errors; mend them, or leave the rows out with "
                "--on-row-error skip"
            )
    else:
        _emit(output, found, report, made)
    return 0 if report.passes or made is not None else DOES_NOT_PASS


def _fixed(client: Client, name: str, files: list[pathlib.Path], move: bool, asked: Plan) -> datasets_pb2.Dataset:
    from qlorad.cli import progress

    sent: list[Any] = list(files)
    with progress.shown(f"datasets/{name}") as tell:
        return client.datasets.create(name, sent, move_alias=move, progress=tell, **asked)


def _heard(output: Format, told: Iterator[Any]) -> tuple[list[datasets_pb2.Finding], datasets_pb2.ValidationReport]:
    """The findings and the report; as JSON lines findings are told as they come, and not held."""
    from qlorad.v1 import datasets_pb2

    found: list[datasets_pb2.Finding] = []
    for one in told:
        if isinstance(one, datasets_pb2.ValidationReport):
            return found, one
        if output is Format.jsonl:
            out.emit_json({"finding": out.as_dict(one)})
        else:
            found.append(one)
    raise AssertionError("a validation ends with its report")


def _emit(
    output: Format,
    found: list[datasets_pb2.Finding],
    report: datasets_pb2.ValidationReport,
    made: datasets_pb2.Dataset | None,
) -> None:
    rest = {"report": out.as_dict(report)}
    if made is not None:
        rest["dataset"] = out.as_dict(made)
    if output is Format.json:
        out.emit_json({"findings": [out.as_dict(f) for f in found], **rest})
    else:
        for key, value in rest.items():
            out.emit_json({key: value})


def _show_findings(found: list[datasets_pb2.Finding], most: int) -> None:
    cells = [[cell(f) for _, cell in FINDINGS] for f in found[:most]]
    out.table([title for title, _ in FINDINGS], cells, "no findings")
    if len(found) > most:
        out.say(f"and {len(found) - most} more; --most shows more of them")


def _show_report(report: datasets_pb2.ValidationReport) -> None:
    stats = report.stats
    severities = ", ".join(f"{report.severities[s]} {s}" for s in ("error", "warning", "info") if report.severities[s])
    rows = [
        ("passes", "yes" if report.passes else "no"),
        ("rows", f"{sum(stats.rows.values())} good, {stats.skipped_rows} with errors"),
        ("duplicates", f"{stats.duplicate_rows} exact, {stats.near_duplicate_rows} near"),
        ("findings", severities or "none"),
        ("repaired", counted(stats.repaired)),
        ("papers", below_score(stats)),
        ("dropped", by_step(stats.dropped_by_step)),
        ("changed", by_step(stats.changed_by_step)),
        ("score", f"{stats.quality.score:.1f} of 100"),
    ]
    print()
    for key, value in rows:
        if value:
            print(f"{key:<10}  {value}")
    print()
    parts = [[p.name, f"{p.score:.1f}", f"{p.weight:.0%}", p.told] for p in stats.quality.parts]
    out.table(["PART", "SCORE", "WEIGHT", "BECAUSE"], parts, "no parts")


def steps(output: Output = Format.table) -> None:
    """Lists the steps that --steps may name, those of plug-ins too, with their parameters."""
    columns: list[out.Column] = [
        ("STEP", lambda s: s.name),
        ("DOES", lambda s: s.description),
        ("PARAMETERS", lambda s: parameters.told(s.parameters_schema_json)),
        ("PACKAGE", lambda s: s.package),
    ]
    with connected() as client:
        out.many(output, "steps", client.datasets.steps(), columns, "no steps")
