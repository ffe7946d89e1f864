"""`qlorad dataset stats`: a dataset in figures and pictures.

Law of this room: rows are counted by the daemon; here figures are only shown.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import dataset_options as given
from qlorad.cli import output as out
from qlorad.cli import picture
from qlorad.cli.dataset_show import counted, show_dataset
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.v1 import datasets_pb2


def add_to(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("stats")(stats)


def stats(
    name: given.Name,
    model: Annotated[str, typer.Option(help="Count tokens as this model reads them.")] = "",
    prompt_format: Annotated[
        str, typer.Option(help="How conversations become text, as in chatml; else the model's template.")
    ] = "",
    max_length: Annotated[
        list[int] | None, typer.Option(min=1, help="A length to forecast for; may be repeated; else powers of two.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Counts, forms, languages and lengths of a dataset; with --model tokens, and what each length would cut."""
    from qlorad import errors
    from qlorad.cli import progress

    if not model and (prompt_format or max_length):
        raise errors.invalid("--model", model, "a model, since tokens are asked for")
    with connected() as client:
        dataset = client.datasets.get(name)
        measure = None
        if model:
            with progress.shown("measure") as tell:
                measure = client.datasets.measure(
                    name, model, prompt_format=prompt_format, max_length_tokens=max_length or [], progress=tell
                )
    if output is not Format.table:
        told: dict[str, Any] = {"dataset": out.as_dict(dataset)}
        if measure is not None:
            told["measure"] = out.as_dict(measure)
        out.emit_json(told)
        return
    show_dataset(output, dataset)
    _show_counts(dataset)
    if measure is not None:
        _show_measure(measure)


def _show_counts(dataset: datasets_pb2.Dataset) -> None:
    told = dataset.stats
    kept = max(1, sum(told.rows.values()))
    print(f"\nforms: {counted(told.forms)}; languages: {counted(told.languages) or 'not told'}")
    words = f"{told.output_words / kept:.1f} words learnt a row"
    print(f"{told.characters} characters, {told.characters / kept:.0f} a row; {words}")
    _bars("characters of a row", told.row_characters)
    if told.quality.parts:
        print()
        parts = [[p.name, f"{p.score:.1f}", f"{p.weight:.0%}", p.told] for p in told.quality.parts]
        out.table(["PART", "SCORE", "WEIGHT", "BECAUSE"], parts)


def _show_measure(measure: datasets_pb2.DatasetMeasure) -> None:
    share = measure.trained_tokens / measure.tokens if measure.tokens else 0.0
    told = f"{measure.trained_tokens} ({share:.1%}) trained" if measure.rows else "none is trained"
    print(f"\n{measure.tokens} tokens in {measure.rows} rows, {told}")
    if measure.unusable_rows:
        print(f"rows that cannot be trained on: {counted(measure.unusable_rows)}")
    if not measure.rows:
        return
    _bars("tokens of a row", measure.row_tokens)
    print()
    out.table(["OF ROWS", "AT MOST"], [[f"{q.share:.0%}", f"{q.tokens} tokens"] for q in measure.quantiles])
    print()
    show_forecasts(measure)


def show_forecasts(measure: datasets_pb2.DatasetMeasure) -> None:
    """What each maximal length would do."""
    rows = [
        [
            str(f.max_length_tokens), str(f.longer_rows), str(f.cut_tokens), str(f.cut_trained_tokens),
            str(f.packed_sequences), f"{f.packing_fill:.1%}",
        ]
        for f in measure.forecasts
    ]  # fmt: skip
    out.table(["MAX LENGTH", "LONGER ROWS", "CUT TOKENS", "CUT TRAINED", "PACKED SEQUENCES", "FILL"], rows)


def _bars(title: str, histogram: datasets_pb2.Histogram) -> None:
    fancy = out.unicode_ok(sys.stdout)
    lines = picture.histogram(histogram.bounds, histogram.counts, fancy=fancy)
    if lines:
        print(f"\n{title}")
        for line in lines:
            print(line)
