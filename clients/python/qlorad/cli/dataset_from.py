"""`qlorad dataset from-docs`: documents to a dataset that a job can train on, each stage shown.

Law of this room: every stage is a call that any client may make; nothing is
decided here but the length of a row, which is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import dataset_options as given
from qlorad.cli import output as out
from qlorad.cli.dataset_make import alias_of, created, not_taken
from qlorad.cli.dataset_show import came_from, counted, example_text, rows_of
from qlorad.cli.dataset_stats import show_forecasts
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad._documents import Documents
    from qlorad.client import Client
    from qlorad.v1 import datasets_pb2

_MOST_FILES = 40


def add_to(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("from-docs")(from_docs)


def from_docs(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder with documents, or one document.")],
    model: Annotated[str, typer.Option(help="The model that is to be trained: its tokenizer and template count.")],
    name: Annotated[str, typer.Option(help="The alias to give; else the folder's name.")] = "",
    as_texts: Annotated[bool, typer.Option("--texts", help="Whole sections as plain texts, no questions.")] = False,
    validation: Annotated[float, typer.Option(help="Share set aside for validation.")] = 0.1,
    test: given.TestShare = 0.0,
    seed: given.Seed = 0,
    on_row_error: Annotated[
        str, typer.Option("--on-row-error", help="refuse, or skip: leave out documents that cannot be read.")
    ] = "refuse",
    near_duplicates: given.Near = "",
    steps: given.Steps = None,
    repair: given.Repair = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest row in tokens; else the shortest power of two that holds all.")
    ] = None,
    over_length: Annotated[
        str, typer.Option(help="What becomes of longer rows: error, truncate, drop or split.")
    ] = "split",
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 2,
    move: given.Move = False,
    request_id: given.Request = "",
    output: Output = Format.table,
) -> None:
    """Makes a dataset of documents: finds, reads, validates, splits, seals, counts a model's tokens, shows rows."""
    import pathlib

    from qlorad import _documents
    from qlorad._wire_core import enum_value
    from qlorad.cli import leaving
    from qlorad.v1 import datasets_pb2

    enum_value(datasets_pb2.OverLength, "OVER_LENGTH_", "--over-length", over_length)
    found = _documents.find(folder)
    alias = name or alias_of(pathlib.Path(folder).expanduser().resolve().name.partition(".")[0])
    asked = given.plan(
        "text" if as_texts else "", None, validation, test, seed, "", False, on_row_error, False, near_duplicates,
        None, repair, steps,
    )  # fmt: skip
    told = _Told(output)
    with connected() as client:
        client.models.get(model)  # an unknown one is told before anything is sent
        if not move and not request_id:
            not_taken(client, alias)
        told.found(folder, found)
        told.dataset(created(client, alias, found.files, move, request_id, asked))
        with leaving.told_when_made(alias, f"qlorad dataset ledger {alias} --model {model}"):
            measure, ledger = _fitted(client, alias, model, max_length, over_length)
            told.fitted(model, measure, ledger)
            told.preview([json.loads(line) for line in client.datasets.export(alias, max_rows=rows)] if rows else [])
    told.end(alias, model)


def _fitted(
    client: Client, alias: str, model: str, max_length: int | None, over_length: str
) -> tuple[datasets_pb2.DatasetMeasure, datasets_pb2.Ledger]:
    """Lengths in the model's tokens, and the rows as they will be trained on."""
    from qlorad.cli import progress

    with progress.shown("measure") as tell:
        measure = client.datasets.measure(
            alias, model, max_length_tokens=[max_length] if max_length else [], progress=tell
        )
    whole = [f.max_length_tokens for f in measure.forecasts if not f.longer_rows]
    length = max_length or (whole[0] if whole else measure.forecasts[-1].max_length_tokens)
    with progress.shown("ledger") as tell:
        ledger = client.datasets.ledger(alias, model, max_length_tokens=length, over_length=over_length, progress=tell)
    return measure, ledger


class _Told:
    """What is printed, stage by stage: as it happens, or with `-o json` as one document at the end."""

    def __init__(self, output: Format) -> None:
        self._output = output
        self._all: dict[str, Any] = {}

    def _tell(self, stage: str, value: Any) -> bool:
        """Whether the stage is to be shown to a person."""
        if self._output is Format.jsonl:
            out.emit_json({stage: value})
        self._all[stage] = value
        return self._output is Format.table

    def found(self, folder: str, found: Documents) -> None:
        files = [name for _, name in found.files]
        told = {"files": files, "kinds": dict(found.kinds()), "others": dict(found.others), "empty": list(found.empty)}
        if not self._tell("found", told):
            return
        print(f"found    {_several(len(files), 'document')} in {folder}: {_counts(found.kinds())}")
        if found.others:
            print(f"         {_several(sum(found.others.values()), 'other file')} passed over: {_counts(found.others)}")
        if found.empty:
            print(f"         {_several(len(found.empty), 'empty document')} passed over: {', '.join(found.empty)}")

    def dataset(self, made: datasets_pb2.Dataset) -> None:
        if not self._tell("dataset", out.as_dict(made)):
            return
        stats, files = made.stats, made.lineage.files
        print(f"read     {_several(len(files), 'document')}, {_several(sum(f.items for f in files), 'item')}")
        if stats.skipped_documents:
            told = f"{_several(stats.skipped_documents, 'document')} could not be read and "
            print(f"         {told}{'were' if stats.skipped_documents > 1 else 'was'} left out; see the findings")
        for file in files[:_MOST_FILES]:
            print(f"         {file.items:5}  {file.container:<8}  {file.file}")
        if len(files) > _MOST_FILES:
            print(f"         and {len(files) - _MOST_FILES} more")
        print(f"items    {counted(stats.document_items)}")
        print(f"left out {counted(stats.left_out_blocks) or 'nothing'}")
        exact = f"{stats.duplicate_rows} exact duplicates dropped" if stats.duplicate_rows else "no exact duplicates"
        print(f"quality  {stats.quality.score:.1f} of 100; {exact}, {stats.near_duplicate_rows} near")
        print(f"split    {rows_of(made)}")
        print(f"sealed   {made.name}  {made.digest}")

    def fitted(self, model: str, measure: datasets_pb2.DatasetMeasure, ledger: datasets_pb2.Ledger) -> None:
        self._tell("measure", out.as_dict(measure))
        if not self._tell("ledger", out.as_dict(ledger)):
            return
        print(f"lengths  {measure.tokens} tokens of {model}, {measure.trained_tokens} trained")
        print()
        show_forecasts(measure)
        print(f"\nledger   {ledger.digest}, at most {ledger.max_length_tokens} tokens a row")
        for split in ledger.splits:
            cut = f"; {split.split_rows} rows cut in pieces" if split.split_rows else ""
            cut += f"; {split.truncated_rows} rows cut off" if split.truncated_rows else ""
            cut += f"; {split.dropped_rows} rows left out" if split.dropped_rows else ""
            print(
                f"         {split.split}: {split.rows} rows, {split.tokens} tokens, {split.trained_tokens} trained{cut}"
            )

    def preview(self, examples: list[dict[str, Any]]) -> None:
        if self._tell("preview", examples):
            for number, example in enumerate(examples, 1):
                print(f"\n--- row {number}{came_from(example)}\n{example_text(example)}")

    def end(self, alias: str, model: str) -> None:
        if self._output is Format.json:
            out.emit_json(self._all)
        elif self._output is Format.table:
            out.say(f"\n`qlorad dataset findings {alias}` tells what was left out and why")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
