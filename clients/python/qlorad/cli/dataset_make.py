"""`qlorad dataset upload`, `import`, `split`: new datasets of files, hubs, folders and other datasets.

Law of this room: every verb makes one plan and one call; nothing is decided here.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import dataset_options as given
from qlorad.cli import output as out
from qlorad.cli.dataset_show import show_dataset
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.plans import Plan
    from qlorad.v1 import datasets_pb2


def add_to(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("upload")(upload)
    app.command("import")(import_)
    app.command("split")(split)


def upload(
    files: Annotated[
        list[pathlib.Path],
        typer.Argument(
            help="JSONL, JSON, CSV, TSV, Parquet or Arrow files, packed as .gz or .zst too; Markdown, text, HTML, PDF "
            "or DOCX; in order."
        ),
    ],
    name: Annotated[str, typer.Option(help="The alias to give; else the first file's name.")] = "",
    format: given.FormatOf = "",
    validation: given.Share = None,
    test: given.TestShare = 0.0,
    seed: given.Seed = 0,
    stratify_by: given.Stratify = "",
    on_row_error: given.OnRowError = "refuse",
    column: given.Column = None,
    steps: given.Steps = None,
    repair: given.Repair = None,
    near_duplicates: given.Near = "",
    similarity: given.Similarity = None,
    min_score: given.MinScore = None,
    move: given.Move = False,
    keep_duplicates: given.KeepDuplicates = False,
    request_id: given.Request = "",
    output: Output = Format.table,
) -> None:
    """Uploads files and makes a dataset of them. Goes on where an earlier upload was cut."""
    asked = given.plan(
        format, column, validation, test, seed, stratify_by, False, on_row_error, keep_duplicates, near_duplicates,
        similarity, repair, steps, min_score,
    )  # fmt: skip
    _make(output, name or alias_of(files[0].name.partition(".")[0]), files, move, request_id, asked)


def import_(
    source: Annotated[
        str, typer.Argument(help="hub:OWNER/NAME[@REVISION], https://…, or a folder of the daemon's host.")
    ] = "",
    url: given.Urls = None,
    chroma: given.Chroma = "",
    collection: given.Collection = "",
    name: Annotated[str, typer.Option(help="The alias to give; else the source's name.")] = "",
    config: given.Config = "",
    split: given.Splits = None,
    file: given.Patterns = None,
    keep_splits: given.KeepSplits = False,
    format: given.FormatOf = "",
    validation: given.Share = None,
    test: given.TestShare = 0.0,
    seed: given.Seed = 0,
    stratify_by: given.Stratify = "",
    on_row_error: given.OnRowError = "refuse",
    column: given.Column = None,
    steps: given.Steps = None,
    repair: given.Repair = None,
    near_duplicates: given.Near = "",
    similarity: given.Similarity = None,
    min_score: given.MinScore = None,
    move: given.Move = False,
    keep_duplicates: given.KeepDuplicates = False,
    request_id: given.Request = "",
    output: Output = Format.table,
) -> None:
    """Makes a dataset of a hub's repository, of a folder laid out like one, of pages by URL, or of a Chroma collection.

    What a hub gave is kept for a week.
    """
    asked = given.plan(
        format, column, validation, test, seed, stratify_by, keep_splits, on_row_error, keep_duplicates,
        near_duplicates, similarity, repair, steps, min_score,
    )  # fmt: skip
    if url or chroma or collection:
        given.alone(source, config, split or [], file or [])
        asked = given.elsewhere(asked, url or [], chroma, collection)
        last = collection or _of_url(url or [])
    else:
        asked = given.sourced(asked, source, config, split or [], file or [])
        last = _of_url([source]) if "urls" in asked else source.partition("@")[0]
        if "folder" in asked:
            last = str(pathlib.Path(source).resolve())
    _make(output, name or alias_of(re.split(r"[/:]", last)[-1]), [], move, request_id, asked)


def split(
    dataset: given.Name,
    name: given.Alias,
    validation: given.Share = None,
    test: given.TestShare = 0.0,
    seed: given.Seed = 0,
    stratify_by: given.Stratify = "",
    near_duplicates: given.Near = "",
    similarity: given.Similarity = None,
    steps: given.Steps = None,
    move: given.Move = False,
    request_id: given.Request = "",
    output: Output = Format.table,
) -> None:
    """Makes a dataset of another's rows, split anew; equal and nearly equal rows stay on one side.

    --validation 0 without --test makes one split of all.
    """
    asked = given.plan(
        validation=validation, test=test, seed=seed, stratify_by=stratify_by, near=near_duplicates,
        similarity=similarity, steps=steps,
    )  # fmt: skip
    _make(output, name, [], move, request_id, {**asked, "parents": [dataset]})


def _of_url(urls: list[str]) -> str:
    """What a dataset of pages is called: the last part of the first one's path, or its host."""
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(urls[0])
    return unquote(parts.path).rstrip("/").rpartition("/")[2].partition(".")[0] or (parts.hostname or "")


def _make(output: Format, alias: str, files: list[pathlib.Path], move: bool, request_id: str, asked: Plan) -> None:
    with connected() as client:
        if not move and not request_id:
            not_taken(client, alias)
        made = created(client, alias, [(path, "") for path in files], move, request_id, asked)
    show_dataset(output, made)
    if output is Format.table and made.stats.findings:
        out.say(f"`qlorad dataset findings {alias}` tells each finding")


def created(
    client: Client, alias: str, files: Sequence[tuple[pathlib.Path, str]], move: bool, request_id: str, asked: Plan
) -> datasets_pb2.Dataset:
    """Sends files, each under its own name or another, and makes the dataset; who leaves is told what goes on."""
    from qlorad.cli import leaving, progress

    with leaving.told(alias, move, request_id) as making, progress.shown(f"datasets/{alias}") as tell:
        sent = [client.datasets.upload(path, filename=name, progress=tell) for path, name in files]
        heard = making.asking(tell)
        return client.datasets.create(
            alias, sent, move_alias=move, progress=heard, request_id=making.request_id, **asked
        )


def not_taken(client: Client, alias: str) -> None:
    """Asks before anything is sent or fetched: the name may be wrong, or taken."""
    from qlorad import errors

    try:
        taken = client.datasets.get(alias)
    except errors.NotFound:
        return
    except errors.InvalidArgument:
        accepted = "1 to 63 of [a-z0-9._-], begun and ended by a letter or digit, without '..'; not 'base'"
        raise errors.invalid("--name", alias, accepted) from None
    raise errors.AlreadyExists(
        f"{taken.name!r} exists already; choose another --name, or --move it",
        reason="ALREADY_EXISTS",
        resource=taken.name,
    )


def alias_of(name: str) -> str:
    """An alias like a file's or a repository's name."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "dataset"
