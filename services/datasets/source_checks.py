"""Whether a source is well formed: every violation at once.

Law of this room: pure. Whether the named things exist is asked elsewhere, and a
link that leads out of the roots is found by who follows it.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from qlorad.v1 import datasets_pb2
from services.common.errors import Violation, show
from services.datasets import web_rules

MAX_PATTERNS = 100
MAX_SPLITS = 100
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}")
_REPO_RULE = "'OWNER/NAME' or 'NAME' of [A-Za-z0-9._-], at most 96 characters, without '--', '..' or '.git'"
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+@-]{0,254}")
_REVISION_RULE = "a branch, tag or commit of [A-Za-z0-9._/+@-], at most 255 characters, without '..'"
_SPLIT = re.compile(r"\w[\w.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_hub(source: datasets_pb2.HubSource) -> list[Violation]:
    """Violations of a hub source."""
    wrong = []
    repo, revision = source.repo, source.revision
    odd = "--" in repo or ".." in repo or repo.endswith(".git")
    if not _REPO.fullmatch(repo) or len(repo) > 96 or odd:
        wrong.append(Violation("hub.repo", show(repo), _REPO_RULE))
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        wrong.append(Violation("hub.revision", show(revision), _REVISION_RULE))
    return wrong + _choice("hub", source.config, source.splits, source.files)


def check_folder(source: datasets_pb2.FolderSource, roots: Sequence[pathlib.Path] = ()) -> list[Violation]:
    """Violations of a folder source; who gives no absolute path is told the roots. Who leaves them is refused later."""
    wrong = _path("folder.path", source.path, roots)
    return wrong + _choice("folder", source.config, source.splits, source.files)


def check_web(source: datasets_pb2.WebSource) -> list[Violation]:
    """Violations of pages by URL; whether their hosts are allowed is asked later."""
    urls = source.urls
    if not 1 <= len(urls) <= web_rules.MAX_URLS:
        return [Violation("web.urls", f"{len(urls)} URLs", f"1 to {web_rules.MAX_URLS}")]
    wrong = []
    for i, url in enumerate(urls):
        if web_rules.is_wrong_url(url):
            wrong.append(Violation(f"web.urls[{i}]", show(url), web_rules.URL_RULE))
        elif url in urls[:i]:
            wrong.append(Violation(f"web.urls[{i}]", show(url), "each URL once"))
    return wrong


def check_chroma(source: datasets_pb2.ChromaSource) -> list[Violation]:
    """Violations of a Chroma collection."""
    wrong = _path("chroma.path", source.path)
    name = source.collection
    if not 1 <= len(name) <= 512 or _CONTROL.search(name):
        accepted = "a name of 1 to 512 characters, none of them control characters"
        wrong.append(Violation("chroma.collection", show(name), accepted))
    return wrong


def _path(field: str, path: str, roots: Sequence[pathlib.Path] = ()) -> list[Violation]:
    if not path.startswith("/") or ".." in path.split("/") or _CONTROL.search(path) or len(path) > 4096:
        below = f", below {', '.join(map(str, roots))}" if roots else ""
        return [Violation(field, show(path), f"an absolute path without '..'{below}")]
    return []


def _choice(place: str, config: str, splits: Sequence[str], files: Sequence[str]) -> list[Violation]:
    wrong = []
    if len(config) > 255 or _CONTROL.search(config):
        wrong.append(
            Violation(f"{place}.config", show(config), "at most 255 characters, none of them control characters")
        )
    if config and files:
        wrong.append(Violation(f"{place}.config", show(config), f"a config or {place}.files, not both"))
    if len(splits) > MAX_SPLITS:
        wrong.append(Violation(f"{place}.splits", f"{len(splits)} splits", f"at most {MAX_SPLITS}"))
    for i, split in enumerate(splits[:MAX_SPLITS]):
        if not _SPLIT.fullmatch(split):
            wrong.append(
                Violation(f"{place}.splits[{i}]", show(split), "a name such as 'train', at most 64 characters")
            )
        elif split in splits[:i]:
            wrong.append(Violation(f"{place}.splits[{i}]", show(split), "each split once"))
    if len(files) > MAX_PATTERNS:
        wrong.append(Violation(f"{place}.files", f"{len(files)} patterns", f"at most {MAX_PATTERNS}"))
    for i, pattern in enumerate(files[:MAX_PATTERNS]):
        if not _is_pattern(pattern):
            rule = "a pattern of paths inside, as in 'data/*.jsonl', at most 512 characters, without '..' or '\\'"
            wrong.append(Violation(f"{place}.files[{i}]", show(pattern), rule))
    return wrong


def _is_pattern(pattern: str) -> bool:
    if not 1 <= len(pattern) <= 512 or pattern.startswith("/") or "\\" in pattern or "://" in pattern:
        return False
    return ".." not in pattern.split("/") and not _CONTROL.search(pattern)
