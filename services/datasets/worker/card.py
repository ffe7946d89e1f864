"""What a repository's card says of its data files: the `configs:` in README.md's front matter.

Law of this room: pure. A card comes from strangers: it is bounded, holds no
references to itself, and what of it cannot be followed is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from services.common.config import read_yaml
from services.common.errors import Fault, Violation, invalid, show

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
_SPLIT = re.compile(r"\w[\w.-]{0,63}")
_PARAMETERS = {"sep": ",", "delimiter": ","}


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration."""

    name: str
    is_default: bool
    folder: str
    """Where its files lie, "" = at the top."""
    splits: tuple[tuple[str, tuple[str, ...]], ...] | None
    """Patterns by split; None = by the usual conventions below its folder."""


def unusable(field: str, given: str, accepted: str) -> Fault:
    """INVALID_ARGUMENT for a source that is well named but cannot be taken, told in full."""
    return invalid([Violation(field, given, accepted)])


def configs(readme: bytes, field: str) -> list[Config]:
    """The configurations that a card names, in its order; none if it names none. `field` is at fault otherwise."""
    told = _front_matter(readme, field)
    listed = told.get("configs")
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise _odd(field, "configs is no list")
    found = [_config(entry, field) for entry in listed]
    if len({c.name for c in found}) != len(found):
        raise _odd(field, "two configs have the same config_name")
    return found


def _front_matter(readme: bytes, field: str) -> Mapping[str, Any]:
    text = readme[: MAX_BYTES + 1].decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    end = text.find("\n---", 3)
    if end < 0:
        raise _odd(field, f"its front matter has no end within {MAX_BYTES} bytes")
    try:
        _check(text[4 : end + 1], field)
        told = read_yaml(text[4 : end + 1])
    except (yaml.YAMLError, ValueError) as e:
        raise _odd(field, f"its front matter is not YAML that is read here: {e}") from None
    return told if isinstance(told, dict) else {}


def _check(text: str, field: str) -> None:
    """Refuses references, of which nine lines make gigabytes, and depth, which takes the parser's stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise _odd(field, "its front matter refers to itself (&, *)")
        if depth > MAX_DEPTH:
            raise _odd(field, f"its front matter is nested too deep (more than {MAX_DEPTH} levels)")


def _config(entry: Any, field: str) -> Config:
    name = entry.get("config_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise _odd(field, "a config has no config_name")
    for parameter, usual in _PARAMETERS.items():
        if entry.get(parameter, usual) != usual:
            raise _odd(
                field, f"config {show(name)} sets {parameter} to {show(entry[parameter])}, which is not followed"
            )
    folder = entry.get("data_dir") or ""
    if not isinstance(folder, str):
        raise _odd(field, f"config {show(name)} has a data_dir that is no text")
    files = entry.get("data_files")
    splits = None if files is None else tuple(_splits(files, name, field))
    return Config(name, entry.get("default") is True, folder.removeprefix("./").strip("/"), splits)


def _splits(files: Any, name: str, field: str) -> list[tuple[str, tuple[str, ...]]]:
    if isinstance(files, dict):
        pairs = list(files.items())
    elif isinstance(files, list) and files and all(isinstance(f, dict) for f in files):
        pairs = [(f.get("split"), f.get("path")) for f in files]
    else:
        pairs = [("train", files)]
    found = []
    for split, patterns in pairs:
        listed = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(listed, list) or not listed or not all(isinstance(p, str) and p for p in listed):
            raise _odd(field, f"config {show(name)} has data_files that are no patterns: {show(patterns)}")
        if not isinstance(split, str) or not _SPLIT.fullmatch(split):
            raise _odd(field, f"config {show(name)} has a split named {show(split)}")
        away = next((p for p in listed if "://" in p), None)
        if away is not None:
            raise _odd(field, f"config {show(name)} takes files from elsewhere: {show(away)}")
        found.append((split, tuple(listed)))
    return found


def _odd(field: str, told: str) -> Fault:
    return unusable(field, f"README.md, but {told}", "patterns in `files`, which are taken instead of the card")
