"""What the hub says, apart from how it gets there: JSON of its API, error codes, ranges.

Law of this room: pure; shaped after what huggingface_hub reads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from tests.hub.repos import Commit, Repo, Stored

PAGE = 1000


@dataclass(slots=True)
class Answer:
    """One answer: JSON, or bytes of a file."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    told: Any = None
    file: Stored | None = None


def error(status: int, code: str, message: str) -> Answer:
    """An error as the hub words it."""
    return Answer(status, {"X-Error-Code": code, "X-Error-Message": message}, {"error": message})


def no_repo(has_token: bool) -> Answer:
    """A repository that is not there, or not for this caller: who shows no token is not told which."""
    if not has_token:
        return error(401, "RepoNotFound", "Invalid username or password.")
    return error(404, "RepoNotFound", "Repository not found")


def gated(repo: Repo, has_token: bool) -> Answer:
    """A repository that wants consent."""
    told = f"Access to {repo.kind.removesuffix('s')} {repo.name} is restricted."
    return error(403 if has_token else 401, "GatedRepo", told)


def info(repo: Repo, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    """Model or dataset info."""
    told: dict[str, Any] = {
        "_id": hashlib.md5(repo.name.encode(), usedforsecurity=False).hexdigest()[:24],
        "id": repo.name,
        "author": repo.name.partition("/")[0],
        "sha": commit.sha,
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "private": repo.is_private,
        "gated": "auto" if repo.is_gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [_sibling(f, with_blobs) for f in commit.files.values()],
    }
    if repo.kind == "models":
        told["modelId"] = repo.name
    return told


def _sibling(file: Stored, with_blobs: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": file.path}
    if with_blobs:
        told |= {"size": file.size, "blobId": file.blob}
        if file.is_lfs:
            told["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
    return told


def tree(commit: Commit, below: str, query: Mapping[str, str], url: str) -> Answer:
    """A page of a tree; the Link header leads to the next."""
    base = f"{below}/" if below else ""
    inside = [p for p in commit.files if p.startswith(base)]
    if below and not inside:
        return error(404, "EntryNotFound", f"{below} does not exist on this revision")
    deep = query.get("recursive", "").lower() in ("true", "1")
    entries = _entries(commit, inside, base, deep)
    start, limit = int(query.get("cursor", "0")), int(query.get("limit", PAGE))
    answer = Answer(told=entries[start : start + limit])
    if start + limit < len(entries):
        following = urlencode({**query, "cursor": start + limit})
        answer.headers["Link"] = f'<{url}?{following}>; rel="next"'
    return answer


def _entries(commit: Commit, inside: list[str], base: str, deep: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in inside:
        parts = path[len(base) :].split("/")
        for i in range(1, len(parts)):
            folder = base + "/".join(parts[:i])
            if deep or i == 1:
                found.setdefault(folder, _folder(folder))
        if deep or len(parts) == 1:
            found[path] = path_info(commit.files[path])
    return [found[path] for path in sorted(found)]


def _folder(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def path_info(file: Stored) -> dict[str, Any]:
    """A file as tree and paths-info tell it."""
    told: dict[str, Any] = {"type": "file", "oid": file.blob, "size": file.size, "path": file.path}
    if file.is_lfs:
        told["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return told


def resolve(commit: Commit, path: str, cdn: str) -> Answer:
    """A file: its bytes, or where its bytes lie."""
    file = commit.files.get(path)
    if file is None:
        return error(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{file.blob}"'}
    if not file.is_lfs:
        return Answer(200, headers, file=file)
    headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
    headers["Location"] = f"{cdn}/lfs/{file.sha256}/{quote(path.rpartition('/')[2])}"
    return Answer(302, headers)


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a file that is sent."""

    status: int
    first: int
    end: int


def span(range_header: str | None, if_range: str | None, etag: str, size: int) -> Span:
    """What a Range asks for; 416 where there is no such part, all of it where If-Range names other bytes."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", range_header or "")
    if asked is None or not (asked[1] or asked[2]) or (if_range is not None and if_range.strip('"') != etag):
        return Span(200, 0, size)
    if not asked[1]:
        return Span(206, max(0, size - int(asked[2])), size)
    first = int(asked[1])
    end = min(size, int(asked[2]) + 1) if asked[2] else size
    return Span(206, first, end) if first < end else Span(416, 0, 0)
