"""`qlorad dataset`: from files to sealed examples."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import dataset_check, dataset_export, dataset_from, dataset_make, dataset_stats
from qlorad.cli import dataset_show as past
from qlorad.cli import output as out
from qlorad.cli.dataset_options import Name
from qlorad.cli.dataset_show import FINDINGS, came_from, example_text, format_of, rows_of, show_dataset
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.v1 import datasets_pb2

app = typer.Typer(help="Upload files, make datasets of them, look inside.", no_args_is_help=True)
for _verbs in (dataset_make, dataset_from, dataset_check, dataset_stats, dataset_export):
    _verbs.add_to(app)


@app.command("list")
def list_(output: Output = Format.table) -> None:
    """Lists datasets, newest first."""
    columns: list[out.Column] = [
        ("NAME", lambda d: out.bare(d.name)),
        ("ROWS", rows_of),
        ("FORMAT", format_of),
        ("SIZE", lambda d: out.size(d.size_bytes)),
        ("CREATED", lambda d: out.when(d.create_time)),
        ("DIGEST", lambda d: out.short(d.digest)),
    ]
    with connected() as client:
        out.many(output, "datasets", client.datasets.list(), columns, "no dataset yet; `qlorad dataset upload FILE`")


@app.command("show")
def show(
    name: Name,
    lineage: Annotated[bool, typer.Option("--lineage", help="What it was made of, up through its parents.")] = False,
    output: Output = Format.table,
) -> None:
    """Shows one dataset."""
    with connected() as client:
        dataset = client.datasets.get(name)
        if not lineage:
            show_dataset(output, dataset)
            return
        told = past.lineage(client, dataset)
    if output is not Format.table:
        out.emit_json({"lineage": told})
    else:
        print("\n".join(past.tree(told, out.unicode_ok(sys.stdout))))


@app.command("preview")
def preview(
    name: Name,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    split: Annotated[str, typer.Option(help="train, validation or test; else all in this order.")] = "",
    output: Output = Format.table,
) -> None:
    """Shows the first rows as they are sealed."""
    import json

    with connected() as client:
        examples = [json.loads(line) for line in client.datasets.export(name, split=split, max_rows=rows)]
    for example in examples:
        if "line" in example.get("origin", {}):  # a text in ProtoJSON, as all 64-bit numbers
            example["origin"]["line"] = int(example["origin"]["line"])
    if output is Format.json:
        out.emit_json({"examples": examples})
        return
    for number, example in enumerate(examples, 1):
        if output is Format.jsonl:
            out.emit_json(example)
        else:
            print(f"--- row {number}{came_from(example)}\n{example_text(example)}")


@app.command("findings")
def findings(
    name: Name,
    severity: Annotated[str, typer.Option(help="Only info, warning or error, and worse.")] = "",
    output: Output = Format.table,
) -> None:
    """Lists what validation saw."""
    with connected() as client:
        found = client.datasets.findings(name, min_severity=severity)
        out.many(output, "findings", found, FINDINGS, "no findings")


@app.command("delete")
def delete(name: Name, output: Output = Format.table) -> None:
    """Removes an alias, and the files once nothing holds them."""
    with connected() as client:
        out.freed(output, client.datasets.delete(name))


@app.command("ledger")
def ledger(
    name: Name,
    model: Annotated[str, typer.Option(help="The model whose tokenizer and template render the rows.")],
    max_length: Annotated[int, typer.Option(min=1, help="Longest row in tokens.")] = 512,
    over_length: Annotated[str, typer.Option(help="error, truncate, drop or split.")] = "error",
    prompt_format: Annotated[
        str,
        typer.Option(help="chatml, alpaca, llama2, mistral, phi2, phi3, vicuna or plain; else the model's template."),
    ] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    row: Annotated[int, typer.Option(min=0, help="First row to show.")] = 0,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 1,
    output: Output = Format.table,
) -> None:
    """Tells of every token whether it is seen, trained on or cut. Trained text is [[marked]], cut text {{marked}}."""
    from qlorad.cli import progress

    with connected() as client:
        with progress.shown("ledger") as tell:
            made = client.datasets.ledger(
                name,
                model,
                max_length_tokens=max_length,
                over_length=over_length,
                prompt_format=prompt_format,
                progress=tell,
            )
        read = list(client.datasets.ledger_rows(made.digest, split=split, first_row=row, max_rows=rows)) if rows else []
    if output is not Format.table:
        out.emit_json({"ledger": out.as_dict(made), "rows": [out.as_dict(r) for r in read]})
        return
    print(f"ledger {made.digest}, at most {made.max_length_tokens} tokens a row")
    out.table(
        ["SPLIT", "ROWS", "TOKENS", "TRAINED", "TRUNCATED", "SPLIT-UP", "CUT", "DROPPED", "LONGEST", "PACKED", "FILL"],
        [
            [s.split]
            + [
                str(v)
                for v in (
                    s.rows, s.tokens, s.trained_tokens, s.truncated_rows, s.split_rows, s.cut_tokens, s.dropped_rows,
                    s.longest_tokens, s.packed_sequences,
                )
            ]
            + [f"{s.packing_fill:.1%}"]
            for s in made.splits
        ],
    )  # fmt: skip
    for one in read:
        told = f"{len(one.ids)} tokens, {sum(one.trained)} trained, {len(one.cut_ids)} cut"
        print(f"--- row {one.row}{_came_from(one)}: {told}")
        print(_marked(one))


def _came_from(row: datasets_pb2.LedgerRow) -> str:
    if not row.HasField("origin"):
        return ""
    return f" ({row.origin.file}:{row.origin.line}{f', piece {row.piece}' if row.piece else ''})"


def _marked(row: datasets_pb2.LedgerRow) -> str:
    """The row's text: trained in bold on a terminal, in [[brackets]] elsewhere; cut struck, or in {{braces}}."""
    colour = out.terminal(sys.stdout)
    on, off = ("\x1b[1;32m", "\x1b[0m") if colour else ("[[", "]]")
    cut_on, cut_off = ("\x1b[9;31m", "\x1b[0m") if colour else ("{{", "}}")
    runs: list[tuple[bool, list[str]]] = []
    for piece, trained in zip(row.pieces, row.trained, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(piece)
    text = "".join(f"{on}{_whole(pieces)}{off}" if trained else _whole(pieces) for trained, pieces in runs)
    return text + (cut_on + _whole(row.cut_pieces) + cut_off if row.cut_ids else "")


def _whole(pieces: Iterable[str]) -> str:
    """Pieces as one text; bytes that several tokens spell are a character again where all of them are there."""

    def character(found: re.Match[str]) -> str:
        told = bytes(int(n, 16) for n in re.findall("<0x(..)>", found[0]))
        try:
            return told.decode()
        except UnicodeDecodeError:
            return found[0]

    return re.sub("(?:<0x[89A-F][0-9A-F]>){2,}", character, "".join(pieces))
