"""A dataset in a folder of this host: which of its files are rows.

Law of this room: files are read where they lie, and only those that lie there:
a link that leads out of the folder is refused.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, show, too_large
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import layout
from services.datasets.worker.card import unusable
from services.datasets.worker.layout import Ask

MAX_ENTRIES = 200_000
_PIECE = 1 << 20


def fetch(order: ingest_pb2.FetchOrder, tell: Callable[[int, int], None]) -> ingest_pb2.FetchDone:
    """Everything that the order's folder source names, with its digest. The folder is resolved and allowed."""
    asked = order.folder
    root = pathlib.Path(asked.path)
    ask = Ask(asked.config, tuple(asked.splits), tuple(asked.files), "folder", str(root))
    try:
        found = walk(root)
        texts = {p: _text(root, p) for p in layout.texts_needed(found, ask)}
        choice = layout.choose(found, texts, ask)
        return _taken(root, choice, order.max_bytes, tell)
    except PermissionError as e:
        told = f"folder.path: {e.filename} may not be read by this daemon"
        raise Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=str(root)) from None


def walk(root: pathlib.Path) -> list[str]:
    """The paths of all files below a folder, but for hidden ones and those whose names cannot be shown."""
    found: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = f"{folder}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if not entry.name.isprintable():
                    if layout.kind_of(path):
                        raise unusable("folder.path", f"{root}, which holds {show(path)}", "printable file names")
                    continue
                if entry.is_symlink() and not pathlib.Path(entry.path).resolve().is_relative_to(root):
                    accepted = "a folder whose links stay inside of it; copy the file there"
                    raise unusable("folder.path", f"{root}, where {show(path)} is a link out of it", accepted)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{path}/")
                elif entry.is_file():
                    found.append(path)
                if len(found) + len(waiting) > MAX_ENTRIES:
                    raise too_large(f"folder.path: {root}", len(found) + len(waiting), MAX_ENTRIES, "files and folders")
    return found


def _text(root: pathlib.Path, path: str) -> bytes:
    with _real(root, path).open("rb") as f:
        text = f.read(layout.MAX_TEXT_BYTES + 1)
    if len(text) > layout.MAX_TEXT_BYTES:
        accepted = f"at most {layout.MAX_TEXT_BYTES} bytes; or patterns in folder.files, which are taken instead"
        raise unusable("folder.path", f"{path} of more than {layout.MAX_TEXT_BYTES} bytes", accepted)
    return text


def _real(root: pathlib.Path, path: str) -> pathlib.Path:
    """Where a file really lies; looked at again, since a link may have been put there meanwhile."""
    real = (root / path).resolve()
    if not real.is_relative_to(root) or not real.is_file():
        raise unusable("folder.path", f"{root}, where {show(path)} is no file of it", "files that stay as they are")
    return real


def _taken(
    root: pathlib.Path, choice: layout.Choice, max_bytes: int, tell: Callable[[int, int], None]
) -> ingest_pb2.FetchDone:
    files = [(file, _real(root, file.path)) for file in choice.files]
    total = sum(real.stat().st_size for _, real in files)
    if total > max_bytes:
        raise too_large(f"folder.path: {root}", total, max_bytes, "bytes")
    done = ingest_pb2.FetchDone(source=f"folder:{root}", left_out=choice.left_out)
    read = 0
    for file, real in files:
        digest = hashlib.sha256()
        with real.open("rb") as f:
            while piece := f.read(_PIECE):
                digest.update(piece)
                read += len(piece)
                tell(read, total)
        done.sources.add(path=str(real), filename=file.path, split=file.split, sha256=digest.hexdigest())
    return done
