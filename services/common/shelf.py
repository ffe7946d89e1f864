"""The store: where daemons meet. Six verbs: stage, seal, open, list, alias, remove.

Law of this room: what is visible is whole. Payloads are written aside in
`staging/`, fsynced, renamed to `FOLDER/HEX/`; never edited. Aliases are one
small file each, moved by lock, write aside, fsync, rename, with a generation
number. A pin is a file that its holder keeps flocked, so kill -9 frees it.

    store/staging/RANDOM/payload/…          being written
    store/models/HEX/manifest.json, payload/, provenance/JOB.json
    store/models/aliases/NAME.json
    store/pins/HEX/HOLDER
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, errors_pb2
from services.common import artifacts, names
from services.common.errors import Fault, Violation, corrupt, disk_full, in_use, invalid, not_found, show

log = logging.getLogger("qlorad.store")

Kind = artifacts_pb2.ArtifactKind


@dataclass(frozen=True, slots=True)
class Sealed:
    """An artifact on the shelf."""

    manifest: artifacts_pb2.Manifest
    folder: pathlib.Path

    @property
    def payload(self) -> pathlib.Path:
        return self.folder / artifacts.PAYLOAD

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.manifest.files)


@dataclass(frozen=True, slots=True)
class Staged:
    """A payload being written aside; seal it or drop it."""

    folder: pathlib.Path

    @property
    def payload(self) -> pathlib.Path:
        return self.folder / artifacts.PAYLOAD


def fsync_path(path: pathlib.Path) -> None:
    """Makes a file or a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: pathlib.Path, data: bytes) -> None:
    """Replaces a small file: aside, fsync, rename, fsync of the folder."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def _space(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(what) from None
        raise


class Shelf:
    """The store of one `$QLORAD_HOME`. Blocking; daemons call it on a thread."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        for folder in sorted(set(artifacts.FOLDERS.values())):
            (root / folder / "aliases").mkdir(parents=True, exist_ok=True)
        for folder in ("staging", "pins"):
            (root / folder).mkdir(exist_ok=True)

    # stage, seal

    def stage(self) -> Staged:
        """A fresh folder to write a payload into."""
        staged = Staged(self.root / "staging" / secrets.token_hex(8))
        with _space("staging"):
            staged.payload.mkdir(parents=True)
        return staged

    def drop(self, staged: Staged) -> None:
        """Throws a staged payload away."""
        shutil.rmtree(staged.folder, ignore_errors=True)

    def seal(
        self,
        staged: Staged,
        kind: artifacts_pb2.ArtifactKind.ValueType,
        facts: Mapping[str, Any],
        lineage: artifacts_pb2.Lineage | None = None,
        provenance: tuple[str, Mapping[str, Any]] | None = None,
    ) -> Sealed:
        """Publishes a staged payload and returns it.

        The same bytes sealed twice are one artifact; a second provenance is
        laid beside the first. On failure nothing is visible.
        """
        with _space("sealing"):
            manifest = artifacts.make_manifest(kind, staged.payload, facts, lineage)
            manifest.create_time.FromDatetime(datetime.datetime.now(datetime.UTC))
            target = self.root / artifacts.FOLDERS[kind] / names.hex_of(manifest.digest)
            for path in staged.payload.rglob("*"):
                fsync_path(path)
            fsync_path(staged.payload)
            (staged.folder / "provenance").mkdir(exist_ok=True)
            write_durable(staged.folder / artifacts.MANIFEST, artifacts.write_manifest(manifest))
            fsync_path(staged.folder)
            try:
                staged.folder.rename(target)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.drop(staged)
            fsync_path(target.parent)
            sealed = Sealed(artifacts.read_manifest(target / artifacts.MANIFEST), target)
            if provenance is not None:
                self.note(sealed, *provenance)
            return sealed

    def note(self, sealed: Sealed, maker: str, story: Mapping[str, Any]) -> None:
        """Lays provenance beside an artifact, one file a maker."""
        beside = sealed.folder / "provenance"
        beside.mkdir(exist_ok=True)
        data = json.dumps(dict(story), indent=1, sort_keys=True, ensure_ascii=False).encode()
        with _space("noting provenance"):
            write_durable(beside / f"{maker}.json", data)

    def provenance(self, sealed: Sealed) -> dict[str, dict[str, Any]]:
        """Every provenance beside an artifact, by maker."""
        return {p.stem: json.loads(p.read_bytes()) for p in sorted((sealed.folder / "provenance").glob("*.json"))}

    # open, list

    def resolve(self, collection: str, ident: str, field: str = "name") -> str:
        """The digest behind an alias, a digest, or the beginning of one (8 hex digits or more)."""
        name = f"{collection}/{ident}"
        if names.is_digest_prefix(ident):
            found = sorted(p.name for p in (self.root / collection).glob(names.hex_of(ident) + "*"))
            if len(found) > 1:
                raise invalid([Violation(field, show(name), f"more digits: it could be any of {len(found)}")])
            if not found:
                raise not_found(name)
            return "sha256:" + found[0]
        alias = self.alias(collection, ident)
        if alias is None:
            raise not_found(name, [a.name for a in self.aliases(collection)])
        return alias.digest

    def open(self, collection: str, ident: str, verify: bool = False, field: str = "name") -> Sealed:
        """An artifact by alias or digest; `verify` reads and compares every byte."""
        digest = self.resolve(collection, ident, field)
        folder = self.root / collection / names.hex_of(digest)
        if not (folder / artifacts.MANIFEST).exists():
            raise not_found(f"{collection}/{ident}")
        sealed = Sealed(artifacts.read_manifest(folder / artifacts.MANIFEST), folder)
        if sealed.digest != digest:
            raise corrupt(digest, f"the folder holds {sealed.digest}")
        if verify:
            artifacts.verify_payload(sealed.manifest, sealed.payload)
        return sealed

    def every(self, kind: artifacts_pb2.ArtifactKind.ValueType) -> list[Sealed]:
        """Every artifact of a kind, newest first. A corrupt one is logged and left out; `open` names it."""
        found = []
        for path in (self.root / artifacts.FOLDERS[kind]).glob("*/" + artifacts.MANIFEST):
            try:
                manifest = artifacts.read_manifest(path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except Fault as fault:
                log.error("left out of a list: %s", fault)
                continue
            if manifest.kind == kind:
                found.append(Sealed(manifest, path.parent))
        return sorted(found, key=lambda s: (-s.manifest.create_time.ToNanoseconds(), s.digest))

    # alias

    def aliases(self, collection: str) -> list[artifacts_pb2.Alias]:
        """Every alias of a collection, by name."""
        found = (
            self.alias(collection, p.stem) for p in sorted((self.root / collection / "aliases").glob("[!.]*.json"))
        )
        return [a for a in found if a is not None]

    def alias(self, collection: str, name: str) -> artifacts_pb2.Alias | None:
        """One alias, or None."""
        if not names.is_alias(name):
            return None
        try:
            data = (self.root / collection / "aliases" / f"{name}.json").read_bytes()
        except FileNotFoundError:
            return None
        alias = artifacts_pb2.Alias()
        try:
            json_format.Parse(data, alias)
        except (json_format.ParseError, UnicodeDecodeError) as e:
            raise corrupt(f"{collection}/{name}", f"alias cannot be read: {e}") from None
        return alias

    def set_alias(
        self, collection: str, name: str, digest: str, expected_generation: int | None = None
    ) -> artifacts_pb2.Alias:
        """Makes or moves an alias; ABORTED if its generation is not the expected one (0 = absent)."""
        if not names.is_alias(name):
            raise invalid([Violation("alias", show(name), names.ALIAS_RULE)])
        with self._alias_lock(collection):
            if not (self.root / collection / names.hex_of(digest)).is_dir():
                raise not_found(f"{collection}/{digest}")
            now = self.alias(collection, name)
            generation = now.generation if now else 0
            if expected_generation is not None and generation != expected_generation:
                raise Fault(
                    errors_pb2.REASON_STALE_GENERATION,
                    f"'{collection}/{name}' is at generation {generation}, not {expected_generation}",
                    resource=f"{collection}/{name}",
                    metadata={"generation": str(generation), "digest": now.digest if now else ""},
                )
            if now is not None and now.digest == digest:
                return now
            alias = artifacts_pb2.Alias(name=f"{collection}/{name}", digest=digest, generation=generation + 1)
            alias.update_time.FromDatetime(datetime.datetime.now(datetime.UTC))
            data = json_format.MessageToJson(alias, preserving_proto_field_name=True).encode()
            with _space("moving an alias"):
                write_durable(self.root / collection / "aliases" / f"{name}.json", data)
            return alias

    @contextlib.contextmanager
    def _alias_lock(self, collection: str) -> Iterator[None]:
        fd = os.open(self.root / collection / "aliases" / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # pins, remove

    def pin(self, digest: str, holder: str) -> Pin:
        """Keeps an artifact from removal for as long as this process keeps the pin. NOT_FOUND if it is gone."""
        with self._pins_lock(fcntl.LOCK_SH):
            if not any((self.root / f / names.hex_of(digest)).is_dir() for f in set(artifacts.FOLDERS.values())):
                raise not_found(digest)
            folder = self.root / "pins" / names.hex_of(digest)
            folder.mkdir(exist_ok=True)
            path = folder / f"{holder.replace('/', ':')}.{os.getpid()}.{secrets.token_hex(3)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            return Pin(path, fd)

    @contextlib.contextmanager
    def _pins_lock(self, how: int) -> Iterator[None]:
        """Shared to pin, alone to look and remove: nobody pins between the look and the removal."""
        fd = os.open(self.root / "pins" / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def holders(self, digest: str) -> list[str]:
        """Who holds an artifact now; pins of the dead are swept away."""
        with self._pins_lock(fcntl.LOCK_EX):
            return self._holders(digest)

    def _holders(self, digest: str) -> list[str]:
        held = []
        for path in sorted((self.root / "pins" / names.hex_of(digest)).glob("*")):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # let go since it was listed: that takes no lock
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                held.append(path.name.rsplit(".", 2)[0].replace(":", "/"))
            finally:
                os.close(fd)
        return sorted(set(held))

    def remove(self, collection: str, ident: str) -> int:
        """Removes an alias and, once nothing points to it, the artifact. Returns bytes freed.

        By digest every alias must be gone already, or the call is refused.
        """
        digest = self.resolve(collection, ident)
        with self._alias_lock(collection), self._pins_lock(fcntl.LOCK_EX):
            pointing = [a.name for a in self.aliases(collection) if a.digest == digest]
            others = [n for n in pointing if n != f"{collection}/{ident}"]
            by_alias = f"{collection}/{ident}" in pointing
            if not by_alias and others:
                raise in_use(f"{collection}/{ident}", others)
            last = not others
            if last and (held := self._holders(digest)):
                raise in_use(f"{collection}/{ident}", held)
            if by_alias:
                (self.root / collection / "aliases" / f"{ident}.json").unlink()
                fsync_path(self.root / collection / "aliases")
            return self._erase(collection, digest) if last else 0

    def _erase(self, collection: str, digest: str) -> int:
        folder = self.root / collection / names.hex_of(digest)
        if not folder.exists():
            return 0
        size = sum(p.stat().st_size for p in (folder / artifacts.PAYLOAD).rglob("*") if p.is_file())
        grave = self.root / "staging" / secrets.token_hex(8)
        folder.rename(grave)  # gone at once for everyone, then emptied at leisure
        fsync_path(folder.parent)
        shutil.rmtree(grave, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.root / "pins" / names.hex_of(digest)).rmdir()
        return size


@dataclass(frozen=True, slots=True)
class Pin:
    """A hold on an artifact."""

    path: pathlib.Path
    fd: int

    def release(self) -> None:
        """Lets go."""
        self.path.unlink(missing_ok=True)
        os.close(self.fd)
