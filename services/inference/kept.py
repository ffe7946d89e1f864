"""Quantised weights that engines keep on disk for their next load: which of them stay.

Law of this room: a folder's name says what it belongs to; what is in it is the engine's (see worker/prepared).
What belongs to no model any more, or was made by other libraries, goes when the daemon starts; beyond the bound
what was used longest ago goes first. Whoever reads or writes a folder has a lock on it, and what is locked stays.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import pathlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass

log = logging.getLogger("qlorad.inference")

FOLDER = "prepared"
_LIBRARIES = ("qlorad-services", "torch", "transformers", "bitsandbytes")
_GONE = ".gone-"
_ASIDE = ".aside-"


@dataclass(frozen=True, slots=True)
class Gone:
    """What was removed, and why."""

    name: str
    size: int
    why: str


def name_of(digest: str, precision: str, capability: str) -> str:
    """The folder of one model in one precision, laid out by these libraries for what this processor can do."""
    return _plain(f"{digest.removeprefix('sha256:')}-{precision}-{_libraries()}-{capability}")


def hold(folder: pathlib.Path) -> int | None:
    """Keeps a folder from being removed until the file that this opens is closed; None if it is not there."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    fcntl.flock(held, fcntl.LOCK_SH)
    if _is(held, folder):
        return held
    os.close(held)  # it went while this waited
    return None


def aside(folder: pathlib.Path) -> pathlib.Path:
    """Where this process writes what is to become a folder."""
    return folder.with_name(f"{_ASIDE}{os.getpid()}")


def sweep(folder: pathlib.Path, models: Collection[str], limit: int) -> list[Gone]:
    """Removes what belongs to no model of these hex digests, what other libraries made, what was never finished,
    and what is beyond so many bytes (0 = no bound); what went."""
    gone, libraries = [], _libraries()
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        why, size = _useless(path.name, models, libraries), size_of(path)
        if why and remove(path):
            gone.append(Gone(path.name, size, why))
    return [*gone, *_shrink(folder, limit)] if limit else gone


def make_room(folder: pathlib.Path, need: int, limit: int) -> bool:
    """Whether there is room for so many bytes more; what was used longest ago makes it. 0 = no bound."""
    if not limit:
        return True
    if need > limit:
        return False
    for one in _shrink(folder, limit - need):
        log.info("kept weights %s make room: %d bytes", one.name, one.size)
    return need + total(folder) <= limit


def total(folder: pathlib.Path) -> int:
    """Bytes of all that is kept."""
    return sum(map(size_of, _whole(folder)))


def size_of(path: pathlib.Path) -> int:
    """Bytes of a folder's files."""
    size = 0
    for file in path.rglob("*"):
        try:
            size += file.stat().st_size if file.is_file() else 0
        except OSError:  # it goes in this moment
            continue
    return size


def remove(path: pathlib.Path) -> bool:
    """Removes a folder that nobody has a lock on; whether it went."""
    try:
        mine = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    away = path if path.name.startswith(_GONE) else path.with_name(f"{_GONE}{path.name}")
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is(mine, path):
            return False
        path.rename(away)  # so that nobody finds half of it
    except OSError:
        return False
    finally:
        os.close(mine)
    shutil.rmtree(away, ignore_errors=True)
    return True


def _shrink(folder: pathlib.Path, limit: int) -> list[Gone]:
    """Removes what was used longest ago, until the rest is no more than the limit or in use."""
    gone = []
    held = total(folder)
    for path in sorted(_whole(folder), key=_used):
        if held <= limit:
            break
        size = size_of(path)
        if remove(path):
            held -= size
            gone.append(Gone(path.name, size, f"more than {limit} bytes are kept"))
    return gone


def _useless(name: str, models: Collection[str], libraries: str) -> str:
    """Why nobody will ever read it; empty = somebody may."""
    if name.startswith((_ASIDE, _GONE)):
        return "it was never finished"
    digest, _, rest = name.partition("-")
    if digest not in models:
        return "its model is gone"
    by = rest.partition("-")[2]
    return "" if by.startswith(_plain(f"{libraries}-")) else "other versions of the libraries made it"


def _whole(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def _used(path: pathlib.Path) -> float:
    """When it was last read or written; whoever reads it touches it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is(held: int, folder: pathlib.Path) -> bool:
    """Whether an open folder still has its name."""
    try:
        return os.path.samestat(os.fstat(held), os.stat(folder))
    except OSError:
        return False


def _libraries() -> str:
    return "-".join(map(_version, _LIBRARIES))


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _plain(name: str) -> str:
    return name.lower().replace("+", "_")
