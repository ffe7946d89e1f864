"""Repositories: folders on disk, seen as commits.

Law of this room: `KIND/OWNER/NAME` is the branch main, `KIND/OWNER/NAME@REV`
the branch or tag REV; a commit's id follows from its content. `.hub.json` in
the folder of main holds settings and is not part of the repository.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SETTINGS = ".hub.json"
LFS = ("*.parquet", "*.arrow", "*.gz", "*.zst", "*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a commit."""

    path: str
    on_disk: pathlib.Path
    size: int
    blob: str
    """Id of its git blob: of the pointer where it lies in LFS."""
    sha256: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob


@dataclass(frozen=True, slots=True)
class Commit:
    """A repository at one moment."""

    sha: str
    files: dict[str, Stored]


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository and its settings."""

    kind: str
    name: str
    folder: pathlib.Path
    token: str
    """Who shows it may read what is private or gated."""
    is_private: bool
    is_gated: bool
    lfs: tuple[str, ...]

    def revisions(self) -> dict[str, pathlib.Path]:
        """Branches and tags with their folders."""
        beside = self.folder.parent.glob(f"{self.folder.name}@*")
        return {"main": self.folder, **{p.name.partition("@")[2].replace("%2F", "/"): p for p in beside}}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class Repos:
    """All of them."""

    root: pathlib.Path
    _known: dict[tuple[pathlib.Path, int, int], tuple[str, str]] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> Repo | None:
        """A repository by kind ("models" or "datasets") and name."""
        folder = self.root / kind / name
        if not folder.is_dir() or "@" in name:
            return None
        settings = folder / SETTINGS
        told: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
        return Repo(
            kind, name, folder, told.get("token", ""), bool(told.get("private")), bool(told.get("gated")),
            tuple(told.get("lfs", LFS)),
        )  # fmt: skip

    def commit(self, repo: Repo, revision: str) -> Commit | None:
        """A commit by branch, tag or id."""
        for name, folder in repo.revisions().items():
            commit = self._read(repo, folder)
            if revision in (name, commit.sha):
                return commit
        return None

    def _read(self, repo: Repo, folder: pathlib.Path) -> Commit:
        files = {f.path: f for f in self._files(repo, folder)}
        told = "".join(f"{f.path}\0{f.sha256}\n" for f in files.values())
        return Commit(hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest(), files)

    def _files(self, repo: Repo, folder: pathlib.Path) -> Iterator[Stored]:
        for on_disk in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SETTINGS):
            path = on_disk.relative_to(folder).as_posix()
            sha256, blob = self._digests(on_disk)
            size = on_disk.stat().st_size
            is_lfs = any(fnmatch.fnmatch(path, p) for p in repo.lfs)
            if is_lfs:
                told = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
                blob = _blob(told.encode())
            yield Stored(path, on_disk, size, blob, sha256, is_lfs)

    def _digests(self, path: pathlib.Path) -> tuple[str, str]:
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._known:
            data = path.read_bytes()
            self._known[key] = hashlib.sha256(data).hexdigest(), _blob(data)
        return self._known[key]

    def by_sha256(self, sha256: str) -> pathlib.Path | None:
        """Where bytes of LFS lie."""
        for (path, mtime, _), digests in list(self._known.items()):
            if digests[0] == sha256 and path.exists() and path.stat().st_mtime_ns == mtime:
                return path
        return None
