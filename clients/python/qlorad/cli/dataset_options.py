"""Options that several verbs of `qlorad dataset` share, and their words as a plan.

Law of this room: a word means the same behind every verb.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli.session import pairs

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.plans import Plan, Step

Name = Annotated[str, typer.Argument(help="A dataset: its alias or sha256:….")]
Alias = Annotated[str, typer.Option("--name", help="The alias to give.")]
Move = Annotated[bool, typer.Option("--move", help="If the alias exists, move it.")]
Request = Annotated[
    str,
    typer.Option(
        "--request-id", help="Comes back to the run of this id, which Ctrl-C told; a new id begins a new run."
    ),
]
FormatOf = Annotated[
    str,
    typer.Option(
        "--format",
        help="instruction, chat, completion, text, sharegpt, preference, infill, canonical or paper; else it is "
        "sniffed.",
    ),
]
Column = Annotated[
    list[str] | None, typer.Option("--column", help="FIELD=COLUMN, as in output=answer; may be repeated.")
]
Share = Annotated[
    float | None,
    typer.Option("--validation", help="Share set aside for validation; else 0.1, or 0 with --keep-splits."),
]
CheckedShare = Annotated[float, typer.Option("--validation", help="Share set aside for validation.")]
TestShare = Annotated[float, typer.Option("--test", help="Share set aside for test.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed and rows, same split.")]
Stratify = Annotated[
    str,
    typer.Option("--stratify-by", help="form, language, source or metadata.KEY: each kind gets its share."),
]
KeepSplits = Annotated[
    bool, typer.Option("--keep-splits", help="Keep the splits that the source has; no shares are set aside.")
]
OnRowError = Annotated[str, typer.Option("--on-row-error", help="refuse or skip.")]
KeepDuplicates = Annotated[bool, typer.Option("--keep-duplicates", help="Keep exact duplicates.")]
Near = Annotated[
    str,
    typer.Option("--near-duplicates", help="ignore, together or drop; else together where rows are set aside."),
]
Similarity = Annotated[
    float | None,
    typer.Option("--similarity", min=0.5, max=1.0, help="How similar near duplicates are; else 0.8."),
]
Repair = Annotated[list[str] | None, typer.Option("--repair", help="A repair by name, or all; may be repeated.")]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--steps", help="A YAML file of steps, or NAME, or NAME={PARAMETER: VALUE, …}; may be repeated, in order."
    ),
]
Config = Annotated[str, typer.Option("--config", help="The configuration that the source's card names.")]
Splits = Annotated[list[str] | None, typer.Option("--split", help="A split of the source; may be repeated; else all.")]
Patterns = Annotated[
    list[str] | None, typer.Option("--file", help="A pattern of files to take, as in data/*.jsonl; may be repeated.")
]
MinScore = Annotated[
    float | None, typer.Option("--min-score", help="Leave out papers whose quality score is lower, and count them.")
]
Urls = Annotated[
    list[str] | None,
    typer.Option("--url", help="A page or file on the web, of a host that the daemon allows; may be repeated."),
]
Chroma = Annotated[
    str, typer.Option("--chroma", help="The folder of Chroma's persistent client, on the daemon's host.")
]
Collection = Annotated[str, typer.Option("--collection", help="The collection in the folder of --chroma.")]


def plan(
    format: str = "",
    column: Sequence[str] | None = None,
    validation: float | None = 0.0,
    test: float = 0.0,
    seed: int = 0,
    stratify_by: str = "",
    keep_splits: bool = False,
    on_row_error: str = "",
    keep_duplicates: bool = False,
    near: str = "",
    similarity: float | None = None,
    repair: Sequence[str] | None = None,
    steps: Sequence[str] | None = None,
    min_score: float | None = None,
) -> Plan:
    """The words of the shared options as a plan; what is wrong with them is told at once, before a byte is sent."""
    if validation is None:
        validation = 0.0 if keep_splits else 0.1
    _check(format, on_row_error, near, validation, test, keep_splits)
    asked: Plan = {
        "format": format,
        "columns": pairs(list(column or []), "--column"),
        "validation": validation,
        "test": test,
        "seed": seed,
        "stratify_by": stratify_by,
        "keep_splits": keep_splits,
        "on_row_error": on_row_error,
        "keep_duplicates": keep_duplicates,
        "near_duplicates": near,
        "repairs": list(repair or []),
        "steps": steps_of(steps or []),
    }
    if similarity is not None:
        asked["similarity"] = similarity
    if min_score is not None:
        asked["min_score"] = min_score
    return asked


def there(client: Client, name: str) -> str:
    """The name of a dataset that is there; NOT_FOUND says that it is no file either."""
    from qlorad import errors

    try:
        client.datasets.get(name)
    except errors.NotFound as e:
        told = f"{e.message}{'' if e.message.endswith('?') else '.'} There is no file of that name either"
        raise errors.NotFound(told, reason=e.reason, resource=e.resource) from None
    return name


def _check(format: str, on_row_error: str, near: str, validation: float, test: float, keep_splits: bool) -> None:
    from qlorad import errors
    from qlorad._wire_core import enum_value
    from qlorad.v1 import datasets_pb2 as pb

    wrong: list[errors.Violation] = []

    def refuse(option: str, given: object, accepted: str) -> None:
        wrong.extend(errors.invalid(option, given, accepted).violations)

    for option, enum, prefix, word in (
        ("--format", pb.RowFormat, "ROW_FORMAT_", format),
        ("--on-row-error", pb.OnRowError, "ON_ROW_ERROR_", on_row_error),
        ("--near-duplicates", pb.NearDuplicates, "NEAR_DUPLICATES_", near),
    ):
        try:
            enum_value(enum, prefix, option, word)
        except errors.InvalidArgument as e:
            wrong.extend(e.violations)
    for option, share in (("--validation", validation), ("--test", test)):
        if not 0 <= share < 1:
            refuse(option, share, "0 to below 1")
    if not wrong and validation + test >= 1:
        refuse("--validation", validation, f"less than 1 together with --test {test:g}")
    if keep_splits and (validation or test):
        refuse("--keep-splits", True, "no --validation and no --test beside it: the source's splits are kept")
    if wrong:
        told = "; ".join(f"{v.field}: {v.description}" for v in wrong)
        raise errors.InvalidArgument(told, reason="INVALID_REQUEST", violations=wrong)


def is_place(source: str) -> bool:
    """Whether a word means a hub's dataset, a page or a folder, as `import` takes them."""
    return source.startswith(("hub:", "https://", "http://")) or pathlib.Path(source).is_dir()


def told_apart(sources: Sequence[str]) -> tuple[list[pathlib.Path], list[str]]:
    """Files, and what else was named: datasets, or one place. They do not mix."""
    from qlorad import errors

    files = [pathlib.Path(s) for s in sources if pathlib.Path(s).is_file()]
    others = [s for s in sources if not pathlib.Path(s).is_file()]
    places = [s for s in others if is_place(s)]
    if files and others:
        raise errors.invalid(
            "SOURCE", others[0], "files that exist; or datasets alone; or one hub:OWNER/NAME, URL or folder"
        )
    if places and len(sources) > 1:
        raise errors.invalid("SOURCE", places[0], "one hub:OWNER/NAME, URL or folder alone")
    return files, others


def sourced(asked: Plan, source: str, config: str, splits: Sequence[str], files: Sequence[str]) -> Plan:
    """The plan with rows of "hub:OWNER/NAME[@REV]", of a page by its URL, or of a folder."""
    from qlorad import errors, plans
    from qlorad.v1 import datasets_pb2 as pb

    if source.startswith("hub:"):
        hub = plans.hub_of(source.removeprefix("hub:"))
        hub.config = config
        hub.splits.extend(splits)
        hub.files.extend(files)
        return {**asked, "hub": hub}
    if source.startswith(("https://", "http://")):
        for option, words in (("--config", config), ("--split", splits), ("--file", files)):
            if words:
                raise errors.invalid(option, words, "nothing beside a page by its URL")
        return {**asked, "urls": [source]}
    if not source:
        raise errors.invalid("SOURCE", source, "hub:OWNER/NAME, https://… or a folder; or --url; or --chroma")
    path = str(pathlib.Path(source).expanduser().resolve())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@.+)?", source) and not pathlib.Path(path).exists():
        raise errors.invalid("SOURCE", source, f"hub:{source} for a dataset of the hub, or the path of a folder")
    return {**asked, "folder": pb.FolderSource(path=path, config=config, splits=splits, files=files)}


def alone(source: str, config: str, splits: Sequence[str], files: Sequence[str]) -> None:
    """Refuses what means nothing beside --url and --chroma."""
    from qlorad import errors

    for option, words in (("SOURCE", source), ("--config", config), ("--split", splits), ("--file", files)):
        if words:
            raise errors.invalid(option, words, "nothing beside --url or --chroma")


def elsewhere(asked: Plan, urls: Sequence[str], chroma: str, collection: str) -> Plan:
    """The plan with rows of pages by URL, or of a Chroma collection."""
    from qlorad import errors

    if urls and (chroma or collection):
        raise errors.invalid("--url", urls[0], "pages, or --chroma with --collection, not both")
    if urls:
        return {**asked, "urls": list(urls)}
    if not chroma:
        raise errors.invalid("--collection", collection, "--chroma DIR beside it")
    if not collection:
        raise errors.invalid("--chroma", chroma, "--collection NAME beside it")
    return {**asked, "chroma": (str(pathlib.Path(chroma).expanduser().resolve()), collection)}


def steps_of(words: Sequence[str]) -> list[Step]:
    """Steps of words, in order: files of them, or one each."""
    found: list[Step] = []
    for word in words:
        path = pathlib.Path(word)
        found += _of_file(path) if path.suffix in (".yaml", ".yml", ".json") else [_of_word(word)]
    return found


def _of_word(word: str) -> Step:
    name, found, told = word.partition("=")
    if not found:
        return name
    if ":" not in told:
        from qlorad import errors

        raise errors.invalid("--steps", word, "NAME, or NAME=PARAMETER: VALUE, as in min_words=min_words: 3")
    parameters = _parsed(told if told.lstrip().startswith("{") else "{" + told + "}", f"--steps {name}")
    return name, parameters


def _of_file(path: pathlib.Path) -> list[Step]:
    from qlorad import errors

    try:
        text = path.read_text()
    except OSError as e:
        raise errors.invalid("--steps", str(path), f"a readable file ({e.strerror})") from None
    tree = _parsed(text, f"--steps {path}")
    steps = tree.get("steps") if isinstance(tree, dict) else tree
    if not isinstance(steps, list) or not all(isinstance(s, str | dict) for s in steps):
        raise errors.invalid("--steps", str(path), "a list of NAME or {NAME: {PARAMETER: VALUE}}, alone or under steps")
    return steps


def _parsed(text: str, option: str) -> Any:
    import yaml

    from qlorad import errors

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        told = " ".join(str(e).split())
        raise errors.invalid(option, text[:80], f"YAML, as in {{min_words: 3}} ({told})") from None
