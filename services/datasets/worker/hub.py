"""A dataset of a hub: what it holds, and its files brought here.

Law of this room: only listed files of one commit are fetched, into names made
of their own digests; every byte is checked against what the commit says; no
file is ever run or unpickled. Waits are bounded: who asks for more patience
than that is told to the caller.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, corrupt, disk_full, show, too_large
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import layout
from services.datasets.worker.card import unusable
from services.datasets.worker.layout import Ask

MAX_PATHS = 200_000
_PIECE = 1 << 20
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_SLOW_SECONDS = 60.0
_SLOW_BYTES = 1024.0
"""A stream that gives less a second than this for so long counts as cut."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long to ask again."""

    tries: int = 5
    """In a row without a byte."""
    cuts: int = 100
    """In all, for one file."""
    first_seconds: float = 0.25
    most_seconds: float = 8.0
    longest_asked_seconds: float = 30.0
    """A server that asks for more is told to the caller at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as a commit lists it."""

    path: str
    size: int
    oid: str
    """sha256 of its bytes where they lie in LFS, else its git blob's id."""

    @property
    def is_lfs(self) -> bool:
        return len(self.oid) == 64


class _Later(Exception):
    """Worth asking again."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass(slots=True)
class _Waits:
    """The waits of one piece of work."""

    patience: Patience
    what: str
    failed: int = 0
    cuts: int = 0

    def after(self, later: _Later, has_progress: bool = False) -> None:
        """Waits, or UPSTREAM where patience ends."""
        self.failed = 1 if has_progress else self.failed + 1
        self.cuts += 1
        asked = later.seconds
        if (asked or 0) > self.patience.longest_asked_seconds:
            raise _upstream(self.what, f"{later}, for {asked:.0f} seconds", asked or 0)
        if self.failed >= self.patience.tries or self.cuts >= self.patience.cuts:
            raise _upstream(self.what, f"{later}, {self.cuts} times", asked or 30.0)
        pause = min(self.patience.most_seconds, self.patience.first_seconds * 2 ** (self.failed - 1))
        time.sleep(pause if asked is None else asked)


def _upstream(what: str, why: str, retry_seconds: float = 30.0) -> Fault:
    told = f"{what}: {why}; what was fetched is kept: call again later"
    return Fault(errors_pb2.REASON_UPSTREAM, told, retry_seconds=max(1.0, retry_seconds))


@dataclass(slots=True)
class Repository:
    """One dataset repository at one revision."""

    endpoint: str
    token: str
    repo: str
    revision: str
    patience: Patience = field(default_factory=Patience)

    def listing(self) -> tuple[str, dict[str, Entry]]:
        """The commit that the revision is now, and its files."""
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        waits = _Waits(self.patience, f"the hub at {self.endpoint}")
        while True:
            try:
                with self._errors(""):
                    info = api.dataset_info(self.repo, revision=self.revision, files_metadata=True, timeout=30)
                    return self._commit(info.sha), self._entries(info.siblings or [])
            except _Later as later:
                waits.after(later)

    def _commit(self, sha: str | None) -> str:
        if not sha or not _COMMIT.fullmatch(sha):
            raise _upstream(self.endpoint, f"{self.repo} has the commit {show(sha)}, which is none")
        return sha

    def _entries(self, siblings: list) -> dict[str, Entry]:
        if len(siblings) > MAX_PATHS:
            raise too_large(self.repo, len(siblings), MAX_PATHS, "files")
        found = {}
        for sibling in siblings:
            path = sibling.rfilename
            if not is_inside(path):
                accepted = "a repository whose files lie inside of it, under names without control characters"
                raise unusable("hub.repo", f"{self.repo}, which lists {show(path)}", accepted)
            oid = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs else sibling.size
            pattern = _SHA256 if sibling.lfs else _BLOB
            if not isinstance(oid, str) or not pattern.fullmatch(oid) or not isinstance(size, int) or size < 0:
                raise _upstream(self.endpoint, f"does not tell size and digest of {show(path)} in {self.repo}")
            found[path] = Entry(path, size, oid)
        return found

    def bring(
        self, entry: Entry, commit: str, objects: pathlib.Path, told: Callable[[int], None]
    ) -> tuple[pathlib.Path, str]:
        """Where a file's bytes lie, and their sha256. `told` hears how many of its bytes are here.

        What an earlier call left is used; CORRUPT if the hub sends other bytes
        than it lists, even from the start.
        """
        whole, part = objects / entry.oid, objects / f"{entry.oid}.part"
        if whole.exists():
            sha256 = _checked(whole, entry)
            if sha256 is not None:
                told(entry.size)
                return whole, sha256
            whole.unlink()
        for is_last in (False, True):
            was_resumed = part.exists()
            self._fill(entry, commit, part, told)
            sha256 = _checked(part, entry)
            if sha256 is not None:
                part.rename(whole)
                return whole, sha256
            part.unlink()
            if is_last or not was_resumed:
                break
        why = f"the hub sent other bytes than commit {commit[:12]} lists for {show(entry.path)}"
        raise corrupt(f"{self.repo}", why)

    def _fill(self, entry: Entry, commit: str, part: pathlib.Path, told: Callable[[int], None]) -> None:
        url = hf_hub_url(self.repo, entry.path, repo_type="dataset", revision=commit, endpoint=self.endpoint)
        waits = _Waits(self.patience, f"{self.endpoint} while sending {show(entry.path)} of {self.repo}")
        with part.open("ab") as out:
            while (have := out.tell()) < entry.size:
                try:
                    with self._errors(entry.path):
                        self._stream(url, entry, out, told)
                        if out.tell() < entry.size:
                            raise _Later("the stream ended early")
                except _Later as later:
                    waits.after(later, has_progress=out.tell() > have)
            if out.tell() > entry.size:
                out.truncate(0)  # a leftover of another file; nothing of it can be trusted
        told(entry.size)

    def _stream(self, url: str, entry: Entry, out, told: Callable[[int], None]) -> None:
        headers = build_hf_headers(token=self.token or False)
        headers["Accept-Encoding"] = "identity"
        have = out.tell()
        if have:
            headers["Range"] = f"bytes={have}-"
        begun, got = time.monotonic(), 0
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            if have and response.status_code == 200:
                out.truncate(0)  # the server does not know ranges
                out.seek(0)
            elif have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise _Later("the hub answered with another range than was asked for")
            for piece in response.iter_bytes():  # as they come: a piece of fixed size is lost with a cut
                if out.tell() + len(piece) > entry.size:
                    raise corrupt(self.repo, f"the hub sends more than {entry.size} bytes for {show(entry.path)}")
                out.write(piece)
                got += len(piece)
                told(out.tell())
                spent = time.monotonic() - begun
                if spent > _SLOW_SECONDS and got < spent * _SLOW_BYTES:
                    raise _Later("the stream stands still")

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Errors of the hub's library as faults, and as _Later what may pass."""
        try:
            yield
        except GatedRepoError:
            raise self._denied("is gated") from None
        except RepositoryNotFoundError:
            hint = "" if self.token else ", or is private and needs a token (--hub-token-file)"
            raise self._missing(f"hub.repo: {show(self.repo)} does not exist at {self.endpoint}{hint}") from None
        except RevisionNotFoundError:
            raise self._missing(f"hub.revision: {self.repo} has no {show(self.revision)}") from None
        except EntryNotFoundError:
            raise self._missing(f"hub.repo: {self.repo} lists {show(path)}, but does not have it") from None
        except HfHubHTTPError as e:
            raise self._by_status(e) from None
        except httpx2.TransportError as e:
            raise _Later(f"it does not answer ({type(e).__name__}: {e})") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as e:
            raise _upstream(self.endpoint, f"cannot be followed ({type(e).__name__}: {e})") from None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise _upstream(self.endpoint, f"does not answer as a hub does ({type(e).__name__}: {e})") from None

    def _by_status(self, error: HfHubHTTPError) -> Exception:
        status = error.response.status_code
        if status in (401, 403):
            return self._denied(f"is not open to this daemon ({status})")
        if status == 404:
            return self._missing(f"hub.repo: {self.repo} is not to be found at {self.endpoint}")
        if status in _AGAIN:
            why = "it asks for patience (429)" if status == 429 else f"it answers with status {status}"
            return _Later(why, asked_seconds(error.response.headers.get("Retry-After"), time.time()))
        if status == 416:
            return _Later("it has no such range")
        return _upstream(self.endpoint, f"answers with status {status}")

    def _denied(self, why: str) -> Fault:
        has = "the token of --hub-token-file has no access" if self.token else "a token is needed (--hub-token-file)"
        told = f"hub.repo: {self.repo} {why}; {has}; ask for access at {self.endpoint}/datasets/{self.repo}"
        return Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=self.repo)

    def _missing(self, told: str) -> Fault:
        return Fault(errors_pb2.REASON_NOT_FOUND, told, resource=self.repo)


def asked_seconds(header: str | None, now: float) -> float | None:
    """What Retry-After asks for: seconds, or a date."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, TypeError):
        return None


def is_inside(path: object) -> bool:
    """Whether a listed path can be one of a repository."""
    if not isinstance(path, str) or not 1 <= len(path) <= 1024 or "\\" in path:
        return False
    return path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))


def _checked(path: pathlib.Path, entry: Entry) -> str | None:
    """The file's sha256 if its bytes are those that the commit lists."""
    size = path.stat().st_size
    if size != entry.size:
        return None
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as f:
        while piece := f.read(_PIECE):
            sha256.update(piece)
            if not entry.is_lfs:
                blob.update(piece)
    return sha256.hexdigest() if entry.oid == (sha256 if entry.is_lfs else blob).hexdigest() else None


def fetch(order: ingest_pb2.FetchOrder, tell: Callable[[int, int], None]) -> ingest_pb2.FetchDone:
    """Everything that the order's hub source names; the files lie in the order's folder."""
    asked = order.hub
    repository = Repository(order.endpoint, order.token, asked.repo, asked.revision or "main")
    objects = pathlib.Path(order.into) / "objects"
    objects.mkdir(exist_ok=True)
    commit, entries = repository.listing()
    ask = Ask(asked.config, tuple(asked.splits), tuple(asked.files), "hub", asked.repo)
    texts = {p: _text(repository, entries[p], commit, objects) for p in layout.texts_needed(list(entries), ask)}
    choice = layout.choose(list(entries), texts, ask)
    total = sum(entries[f.path].size for f in choice.files)
    if total > order.max_bytes:
        raise too_large(f"hub.repo: {asked.repo}", total, order.max_bytes, "bytes")
    missing = sum(entries[f.path].size for f in choice.files if not (objects / entries[f.path].oid).exists())
    free = shutil.disk_usage(objects).free
    if missing > free:
        raise disk_full(f"fetching {missing} bytes of {asked.repo} ({free} are free)")
    done = ingest_pb2.FetchDone(source=f"hub:{asked.repo}@{commit}", left_out=choice.left_out)
    before = 0
    for file in choice.files:
        entry = entries[file.path]
        path, sha256 = repository.bring(entry, commit, objects, functools.partial(_tell_on, tell, before, total))
        done.sources.add(path=str(path), filename=file.path, split=file.split, sha256=sha256)
        before += entry.size
    return done


def _tell_on(tell: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    tell(before + done, total)


def _text(repository: Repository, entry: Entry, commit: str, objects: pathlib.Path) -> bytes:
    if entry.size > layout.MAX_TEXT_BYTES:
        accepted = f"at most {layout.MAX_TEXT_BYTES} bytes; or patterns in hub.files, which are taken instead"
        raise unusable("hub.repo", f"{entry.path} of {entry.size} bytes", accepted)
    return repository.bring(entry, commit, objects, lambda _: None)[0].read_bytes()
