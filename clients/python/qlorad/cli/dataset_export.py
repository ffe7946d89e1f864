"""`qlorad dataset export` and `convert`: rows out, in any form, and what was lost on the way.

Law of this room: rows go to the file or to stdout, words about them to stderr
(or, with `-o json` and a file, to stdout); a file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import dataset_options as given
from qlorad.cli import output as out
from qlorad.cli.dataset_options import Name
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.plans import Plan
    from qlorad.v1 import datasets_pb2

FORMS = "instruction, chat, completion, text, sharegpt, preference, infill or canonical"
Split = Annotated[str, typer.Option(help="train, validation or test; else all in this order.")]
Rows = Annotated[int, typer.Option(min=0, help="At most so many; 0 = all.")]
OnLoss = Annotated[
    str, typer.Option(help="What becomes of rows that the form cannot carry whole: refuse, drop-fields or skip-row.")
]
Read = Callable[[Callable[["datasets_pb2.ExportSummary"], None]], Iterator[bytes]]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("export")(export)
    app.command("convert")(convert)


def export(
    name: Name,
    to: Annotated[pathlib.Path | None, typer.Option(help="The file to write; else stdout.")] = None,
    split: Split = "",
    format: Annotated[str, typer.Option(help=f"{FORMS}; else canonical.")] = "",
    rows: Rows = 0,
    on_loss: OnLoss = "refuse",
    output: Output = Format.table,
) -> None:
    """Writes the rows as JSONL; `-o` is the form of what is said about it, where a file is written."""
    with connected() as client:
        _write(output, to, _reading(client, name, split, format, rows, on_loss))


def convert(
    source: Annotated[str, typer.Argument(help="A dataset (its alias or sha256:…), or a file with rows.")],
    to: Annotated[str, typer.Option(help=f"The form to write: {FORMS}.")],
    from_: Annotated[str, typer.Option("--from", help=f"The form of a file: paper, {FORMS}; else it is sniffed.")] = "",
    column: given.Column = None,
    repair: given.Repair = None,
    out_: Annotated[pathlib.Path | None, typer.Option("--out", help="The file to write; else stdout.")] = None,
    on_loss: OnLoss = "refuse",
    output: Output = Format.table,
) -> None:
    """Writes rows in another form; what that form cannot carry is refused, or told. A file leaves no dataset behind."""
    file = pathlib.Path(source)
    with connected() as client:
        if not file.is_file():
            if from_ or column or repair:
                from qlorad import errors

                told = {"--from": from_, "--column": (column or [""])[0], "--repair": (repair or [""])[0]}
                option = next(option for option, word in told.items() if word)
                raise errors.invalid(option, told[option], "nothing beside a dataset; or the name of a file")
            _write(output, out_, _reading(client, given.there(client, source), "", to, 0, on_loss), "--out")
            return
        name = _passing(client, file, given.plan(format=from_, column=column, repair=repair, keep_duplicates=True))
        try:
            _write(output, out_, _reading(client, name, "", to, 0, on_loss), "--out")
        finally:
            client.datasets.delete(name)


def _passing(client: Client, file: pathlib.Path, asked: Plan) -> str:
    """A dataset of the file's rows, all of them and in their order, under a name that nobody else has."""
    import uuid

    from qlorad.cli import progress

    name = f"convert-{uuid.uuid4().hex[:20]}"
    with progress.shown(f"{file.name}") as tell:
        client.datasets.create(name, [file], progress=tell, **asked)
    return name


def _reading(client: Client, name: str, split: str, form: str, rows: int, on_loss: str) -> Read:
    return lambda told: client.datasets.export(
        name, split=split, format=form, max_rows=rows, on_loss=on_loss, summary=told
    )


def _write(output: Format, to: pathlib.Path | None, read: Read, option: str = "--to") -> None:
    """Writes the lines, then tells what became of the rows."""
    from qlorad.v1 import datasets_pb2

    summary = datasets_pb2.ExportSummary()
    if to is None:
        for line in read(summary.CopyFrom):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        if lost := _lost(summary):
            out.say(lost)
        return
    _to_file(to, read(summary.CopyFrom), option)
    if output is not Format.table:
        out.emit_json({"file": str(to), **out.as_dict(summary)})
        return
    print(f"{summary.rows} rows in {to}")
    if lost := _lost(summary):
        print(lost)


def _to_file(to: pathlib.Path, lines: Iterator[bytes], option: str) -> None:
    """The lines as a file: written beside it, and there whole or not at all."""
    from qlorad import errors

    if to.is_dir():
        raise errors.invalid(option, str(to), "the name of a file; this is a folder")
    part = to.with_name(f"{to.name}.part")
    try:
        with part.open("wb") as f:
            for line in lines:
                f.write(line + b"\n")
        part.replace(to)
    except OSError as e:
        raise errors.invalid(option, str(to), f"a file that can be written ({e.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _lost(summary: datasets_pb2.ExportSummary) -> str:
    """What was lost, in words; nothing where nothing was."""
    told = [f"{n} without {field}" for field, n in sorted(summary.lost_fields.items())]
    if summary.skipped_rows:
        told.append(f"{summary.skipped_rows} left out")
    return f"of these rows: {', '.join(told)}" if told else ""
