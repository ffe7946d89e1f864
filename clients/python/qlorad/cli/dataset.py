"""`qlorad dataset`: from files to sealed examples."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import output as out
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected, pairs

if TYPE_CHECKING:
    from qlorad.v1 import datasets_pb2

app = typer.Typer(help="Upload files, make datasets of them, look inside.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A dataset: its alias or sha256:….")]


@app.command("upload")
def upload(
    files: Annotated[list[pathlib.Path], typer.Argument(help="JSONL, JSON or CSV files, in order.")],
    name: Annotated[str, typer.Option(help="The alias to give; else the first file's name.")] = "",
    format: Annotated[str, typer.Option(help="instruction, chat, completion or text; else it is sniffed.")] = "",
    validation: Annotated[float, typer.Option(help="Share set aside for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share set aside for test.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed and rows, same split.")] = 0,
    on_row_error: Annotated[str, typer.Option(help="refuse or skip.")] = "refuse",
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, as in output=answer; may be repeated.")
    ] = None,
    move: Annotated[bool, typer.Option(help="If the alias exists, move it.")] = False,
    keep_duplicates: Annotated[bool, typer.Option(help="Keep exact duplicates.")] = False,
    output: Output = Format.table,
) -> None:
    """Uploads files and makes a dataset of them. Goes on where an earlier upload was cut."""
    from qlorad.cli import progress

    alias = name or files[0].stem.lower().replace("_", "-").replace(" ", "-")
    with connected() as client, progress.shown(f"datasets/{alias}") as tell:
        made = client.datasets.create(
            alias,
            files,
            format=format,
            validation=validation,
            test=test,
            seed=seed,
            on_row_error=on_row_error,
            columns=pairs(column or [], "--column"),
            move_alias=move,
            keep_duplicates=keep_duplicates,
            progress=tell,
        )
    _show(output, made)


@app.command("list")
def list_(output: Output = Format.table) -> None:
    """Lists datasets, newest first."""
    columns: list[out.Column] = [
        ("NAME", lambda d: out.bare(d.name)),
        ("ROWS", lambda d: _rows(d)),
        ("FORMAT", _format),
        ("SIZE", lambda d: out.size(d.size_bytes)),
        ("CREATED", lambda d: out.when(d.create_time)),
        ("DIGEST", lambda d: out.short(d.digest)),
    ]
    with connected() as client:
        out.many(output, "datasets", client.datasets.list(), columns, "no dataset yet; `qlorad dataset upload FILE`")


@app.command("show")
def show(name: Name, output: Output = Format.table) -> None:
    """Shows one dataset."""
    with connected() as client:
        _show(output, client.datasets.get(name))


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
    if output is Format.json:
        out.emit_json({"examples": examples})
        return
    for number, example in enumerate(examples, 1):
        if output is Format.jsonl:
            out.emit_json(example)
        else:
            print(f"--- row {number}\n{_example_text(example)}")


@app.command("findings")
def findings(
    name: Name,
    severity: Annotated[str, typer.Option(help="Only info, warning or error, and worse.")] = "",
    output: Output = Format.table,
) -> None:
    """Lists what validation saw."""
    from qlorad.v1 import datasets_pb2

    columns: list[out.Column] = [
        ("SEVERITY", lambda f: out.word(datasets_pb2.Severity, "SEVERITY_", f.severity)),
        ("WHERE", lambda f: f"{f.file}:{f.line}" if f.line else f.file),
        ("RULE", lambda f: f.rule),
        ("MESSAGE", lambda f: f.message),
        ("HINT", lambda f: f.hint),
    ]
    with connected() as client:
        found = client.datasets.findings(name, min_severity=severity)
        out.many(output, "findings", found, columns, "no findings")


@app.command("export")
def export(
    name: Name,
    to: Annotated[pathlib.Path | None, typer.Option(help="The file to write; else stdout.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test; else all in this order.")] = "",
    format: Annotated[str, typer.Option(help="instruction, chat, completion or text; else canonical.")] = "",
    rows: Annotated[int, typer.Option(min=0, help="At most so many; 0 = all.")] = 0,
    output: Output = Format.table,
) -> None:
    """Writes the rows as JSONL; `-o` is the form of what is said about it, where a file is written."""
    with connected() as client:
        lines = client.datasets.export(name, split=split, format=format, max_rows=rows)
        if to is None:
            for line in lines:
                sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
            return
        part = to.with_name(to.name + ".part")
        count = 0
        with part.open("wb") as f:
            for line in lines:
                f.write(line + b"\n")
                count += 1
        part.replace(to)
    if output is not Format.table:
        out.emit_json({"file": str(to), "rows": count})
    else:
        print(f"{count} rows in {to}")


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
        ["SPLIT", "ROWS", "TOKENS", "TRAINED", "TRUNCATED", "SPLIT UP", "CUT", "DROPPED", "LONGEST", "PACKED", "FILL"],
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


def _show(wanted: Format, dataset: datasets_pb2.Dataset) -> None:
    rows = [
        ("name", dataset.name),
        ("digest", dataset.digest),
        ("format", _format(dataset)),
        ("rows", _rows(dataset)),
        ("skipped rows", str(dataset.stats.skipped_rows or "")),
        ("duplicates dropped", str(dataset.stats.duplicate_rows or "")),
        ("findings", ", ".join(f"{n} {rule}" for rule, n in sorted(dataset.stats.findings.items()))),
        ("size", out.size(dataset.size_bytes)),
        ("created", out.when(dataset.create_time)),
    ]
    out.one(wanted, dataset, rows)


def _rows(dataset: datasets_pb2.Dataset) -> str:
    rows = dataset.stats.rows
    names = [n for n in ("train", "validation", "test") if n in rows] + sorted(
        set(rows) - {"train", "validation", "test"}
    )
    return ", ".join(f"{rows[n]} {n}" for n in names)


def _format(dataset: datasets_pb2.Dataset) -> str:
    from qlorad.v1 import datasets_pb2 as pb

    return out.word(pb.RowFormat, "ROW_FORMAT_", dataset.format).lower()


def _example_text(example: dict[str, Any]) -> str:
    if "completion" in example:
        body = example["completion"]
        return f"[prompt] {body.get('prompt', '')}\n[completion] {body.get('completion', '')}"
    lines = []
    for message in example.get("chat", {}).get("messages", []):
        role = str(message.get("role", "")).removeprefix("ROLE_").lower()
        lines.append(f"[{role}] " + "".join(part.get("text", "") for part in message.get("parts", [])))
        lines += [f"  calls {call.get('name')}({call.get('arguments_json')})" for call in message.get("tool_calls", [])]
    return "\n".join(lines)
