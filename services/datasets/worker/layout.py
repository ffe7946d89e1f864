"""Which files of a repository or folder are its rows, and of which split.

Law of this room: pure. First what was asked for by pattern, then what the
files themselves say (a saved dataset's state, the card), then the usual
conventions. One kind of file is read; what is passed over is told.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, show
from services.datasets import documents
from services.datasets.worker import card, globs
from services.datasets.worker.card import unusable

MAX_TEXT_BYTES = 4 << 20
MAX_FILES = 10_000
_SUFFIXES = {
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".jsonl": "json", ".ndjson": "json",
    ".json": "json", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
_PACKED = (".gz", ".zst")
_RANK = ("parquet", "json", "csv", "tsv", "arrow")
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json", "config.json"}
_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_ORDER = ("train", "validation", "test")
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_NO_SPLIT = {"data", "part"}


@dataclass(frozen=True, slots=True)
class Ask:
    """What of it is wanted."""

    config: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    place: str
    """"hub" or "folder": the field of the request."""
    name: str
    """What it is called in errors."""


@dataclass(frozen=True, slots=True)
class File:
    """A file to read."""

    path: str
    split: str


@dataclass(frozen=True, slots=True)
class Choice:
    """All that is to be read, in order, and what is not."""

    files: tuple[File, ...]
    left_out: tuple[str, ...] = ()


def kind_of(path: str) -> str:
    """The kind of a data file by its name; "" if it is none."""
    name = path.rpartition("/")[2].lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    stem, dot, suffix = name.rpartition(".")
    return _SUFFIXES.get(dot + suffix, "") if stem else ""


def split_of(name: str) -> str:
    """The split that a word means; the word itself if it is none of the usual ones."""
    return _WORDS.get(name.lower(), name)


def texts_needed(paths: Sequence[str], ask: Ask) -> list[str]:
    """The small files that `choose` wants to look into."""
    if ask.files:
        return []
    there = set(paths)
    if "dataset_dict.json" in there:
        return ["dataset_dict.json", *(p for p in paths if re.fullmatch(r"[^/]+/state\.json", p))]
    return [p for p in ("state.json", "README.md") if p in there]


def choose(paths: Sequence[str], texts: Mapping[str, bytes], ask: Ask) -> Choice:
    """The files to read. NOT_FOUND or INVALID naming what there is."""
    if ask.files:
        choice = Choice(tuple(_named(paths, ask)))
    elif "dataset_dict.json" in texts or "state.json" in texts:
        choice = Choice(tuple(_saved(paths, texts, ask)))
    else:
        choice = _by_card(paths, texts.get("README.md", b""), ask)
    chosen = _wanted(choice.files, ask)
    if len(chosen) > MAX_FILES:
        raise unusable(f"{ask.place}.files", f"{len(chosen)} files", f"patterns of at most {MAX_FILES}")
    return Choice(chosen, choice.left_out)


def _wanted(files: Sequence[File], ask: Ask) -> tuple[File, ...]:
    there = sorted({f.split for f in files}, key=_split_key)
    wanted = [split_of(s) for s in ask.splits]
    for split, asked in zip(wanted, ask.splits, strict=True):
        if split not in there:
            raise _missing(f"{ask.place}.splits", asked, ask, there)
    return tuple(
        sorted(
            (f for f in files if not wanted or f.split in wanted), key=lambda f: (_split_key(f.split), natural(f.path))
        )
    )


def _split_key(split: str) -> tuple[int, str]:
    return (_ORDER.index(split) if split in _ORDER else len(_ORDER), split)


def natural(path: str) -> tuple[Any, ...]:
    """A key that puts 2 before 10."""
    parts = re.split(r"(\d+)", path)
    return (*((int(p), "") if i % 2 else (0, p) for i, p in enumerate(parts)), path)


def _missing(field: str, given: str, ask: Ask, there: Iterable[str]) -> Fault:
    listed = list(there)
    told = ", ".join(map(show, listed[:10])) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
    return Fault(
        errors_pb2.REASON_NOT_FOUND,
        f"{field}: {ask.name} has no {show(given)}; there is: {told or 'none'}",
        resource=ask.name,
    )


# By pattern


def _named(paths: Sequence[str], ask: Ask) -> Iterable[File]:
    found: dict[str, None] = {}
    for pattern in ask.files:
        matched = list(globs.matching(pattern, paths))
        read = [p for p in matched if kind_of(p) or documents.kind_of(p)]
        if not matched:
            raise _missing(f"{ask.place}.files", pattern, ask, sorted(filter(kind_of, paths), key=natural))
        if not read:
            raise unusable(f"{ask.place}.files", f"{pattern}, which is {matched[0]}", f"files that end in {_endings()}")
        found.update(dict.fromkeys(read))
    return [File(p, "train" if documents.kind_of(p) else _split_by_name(p) or "train") for p in found]


def _endings() -> str:
    return ", ".join((*_SUFFIXES, *documents.SUFFIXES))


# A dataset saved to disk


def _saved(paths: Sequence[str], texts: Mapping[str, bytes], ask: Ask) -> Iterable[File]:
    if ask.config not in ("", "default"):
        raise _missing(f"{ask.place}.config", ask.config, ask, ["default"])
    if "dataset_dict.json" not in texts:
        return _state(paths, texts["state.json"], "", "", ask)
    splits = _json(texts["dataset_dict.json"], "dataset_dict.json", ask).get("splits")
    if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
        raise _broken("dataset_dict.json", "has no list of splits", ask)
    files: list[File] = []
    for split in splits:
        if f"{split}/state.json" not in texts:
            raise _broken("dataset_dict.json", f"names the split {show(split)}, which has no state.json", ask)
        files += _state(paths, texts[f"{split}/state.json"], f"{split}/", split, ask)
    return files


def _state(paths: Sequence[str], text: bytes, folder: str, split: str, ask: Ask) -> list[File]:
    name = f"{folder}state.json"
    told = _json(text, name, ask)
    if told.get("_indices_data_files"):
        raise _broken(name, "says that rows were chosen by an index; save the dataset anew", ask)
    listed = told.get("_data_files")
    files = []
    for entry in listed if isinstance(listed, list) else []:
        path = f"{folder}{entry.get('filename')}" if isinstance(entry, dict) else ""
        if path not in paths:
            raise _broken(name, f"names {show(path)}, which is not there", ask)
        own = split or (told.get("_split") if isinstance(told.get("_split"), str) else "")
        files.append(File(path, split_of(own or "train")))
    if not files:
        raise _broken(name, "names no data files", ask)
    return files


def _json(text: bytes, name: str, ask: Ask) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _broken(name, f"is not JSON: {e}", ask) from None
    if not isinstance(told, dict):
        raise _broken(name, "is no JSON object", ask)
    return told


def _broken(name: str, told: str, ask: Ask) -> Fault:
    return unusable(ask.place, f"{ask.name}, whose {name} {told}", "a dataset as save_to_disk leaves it")


# By card and convention


def _by_card(paths: Sequence[str], readme: bytes, ask: Ask) -> Choice:
    configs = card.configs(readme, ask.place) if readme else []
    if not configs:
        if ask.config not in ("", "default"):
            raise _missing(f"{ask.place}.config", ask.config, ask, ["default"])
        return _by_convention(paths, "", ask)
    config = _config(configs, ask)
    base = f"{config.folder}/" if config.folder else ""
    if config.splits is None:
        return _by_convention([p for p in paths if p.startswith(base)], base, ask)
    files = [
        (split, pattern, _expand(base, pattern, paths)) for split, patterns in config.splits for pattern in patterns
    ]
    for split, pattern, found in files:
        if not found:
            given = f"README.md, whose config {show(config.name)} names {show(pattern)} for {split}, which is not there"
            raise unusable(ask.place, given, "patterns in `files`, which are taken instead of the card")
    taken: dict[str, File] = {}
    for split, _, found in files:
        for path in found:
            taken.setdefault(path, File(path, split_of(split)))
    odd = next((p for p in taken if not kind_of(p)), None)
    if odd is not None:
        given = f"README.md, whose config {show(config.name)} names {show(odd)}, which holds no rows that are read here"
        raise unusable(ask.place, given, f"files that end in {', '.join(_SUFFIXES)}, by patterns in `files`")
    return Choice(tuple(taken.values()))


def _expand(base: str, pattern: str, paths: Sequence[str]) -> list[str]:
    whole = base + pattern.removeprefix("./").lstrip("/")
    found = globs.matching(whole + "**" if whole.endswith("/") else whole, paths)
    return [p for p in found if _is_seen(p) or not any(c in pattern for c in "*?[")]


def _config(configs: Sequence[card.Config], ask: Ask) -> card.Config:
    by_name = {c.name: c for c in configs}
    if ask.config:
        if ask.config not in by_name:
            raise _missing(f"{ask.place}.config", ask.config, ask, by_name)
        return by_name[ask.config]
    marked = next((c for c in configs if c.is_default), by_name.get("default"))
    if marked is None and len(configs) > 1:
        raise unusable(f"{ask.place}.config", "", f"one of {', '.join(map(show, list(by_name)[:50]))}")
    return marked or configs[0]


def _is_seen(path: str) -> bool:
    return not any(part.startswith((".", "__")) for part in path.split("/"))


def _by_convention(paths: Sequence[str], base: str, ask: Ask) -> Choice:
    rows = [p for p in paths if kind_of(p) and _is_seen(p) and p.rpartition("/")[2] not in _NO_ROWS]
    written = _documents(paths) if ask.place == "folder" else []
    if not rows and written:
        return Choice(tuple(File(p, "train") for p in written))
    if not rows:
        raise _no_rows(paths, ask)
    counts = Counter(kind_of(p) for p in rows)
    kind = max(counts, key=lambda k: (counts[k], -_RANK.index(k)))
    splits = {p: _split_by_name(p[len(base) :]) for p in rows}
    # Once one file says its split, one that says none is not rows of it.
    told = any(splits[p] for p in rows if kind_of(p) == kind)
    files = [File(p, splits[p] or "train") for p in rows if kind_of(p) == kind and (splits[p] or not told)]
    left = [p for p in rows if p not in {f.path for f in files}]
    there = {f.split for f in files}
    lost = next((p for p in left if splits[p] and splits[p] not in there), None)
    if lost is not None:
        given = (
            f"{ask.name}, where {counts[kind]} files are {kind} but {show(lost)} of {splits[lost]} is {kind_of(lost)}"
        )
        raise unusable(ask.place, given, "patterns of the files to read in `files`")
    left += [p for p in written if p != "README.md"]
    return Choice(tuple(files), tuple(sorted(left, key=natural)))


def _documents(paths: Sequence[str]) -> list[str]:
    """What people wrote; a repository's own words about its rows are none of a hub's."""
    return [p for p in paths if documents.kind_of(p) and _is_seen(p)]


def _split_by_name(path: str) -> str:
    """The split that a path tells: a shard's name, else a folder's, else the file's."""
    shard = _SHARD.fullmatch(path)
    if shard and shard[1].lower() not in _NO_SPLIT:
        return split_of(shard[1])
    *folders, name = path.split("/")
    for part in [*folders, name]:
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return ""


def _no_rows(paths: Sequence[str], ask: Ask) -> Fault:
    script = next((p for p in paths if p.endswith(".py")), None)
    accepted = f"files that end in {', '.join(_SUFFIXES)}, also packed ({', '.join(_PACKED)})"
    if ask.place == "folder":
        accepted += f"; or documents, which end in {', '.join(documents.SUFFIXES)}"
    if script is not None:
        given = f"{ask.name}, which has no data files, only the script {show(script)}; scripts are never run"
        return unusable(ask.place, given, accepted)
    some = ", ".join(map(show, sorted(paths)[:5])) or "nothing"
    return unusable(ask.place, f"{ask.name}, which holds {some}", accepted)
