"""Which files of a folder are documents.

Law of this room: looks at names alone; what is in a file decides the daemon.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qlorad import errors

KINDS: Mapping[str, tuple[str, ...]] = {
    "Markdown": (".md", ".markdown"),
    "plain text": (".txt", ".text"),
    "HTML": (".html", ".htm", ".xhtml"),
    "PDF": (".pdf",),
    "DOCX": (".docx",),
}
MOST = 1000
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents below a folder."""

    files: tuple[tuple[pathlib.Path, str], ...]
    """Each with its path below the folder, in order."""
    others: Mapping[str, int]
    """Files that are no documents, by suffix."""
    empty: tuple[str, ...] = ()
    """Documents of no byte, which cannot be sent."""

    def kinds(self) -> Mapping[str, int]:
        """Documents by kind."""
        return Counter(kind_of(name) for _, name in self.files)


def kind_of(name: str) -> str:
    """The kind of a document by its name; "" for none."""
    return next((kind for kind, suffixes in KINDS.items() if name.lower().endswith(suffixes)), "")


def find(folder: str | os.PathLike[str]) -> Documents:
    """The documents in a folder and below it, hidden ones passed over; or the one that is named itself.

    INVALID where there is none, saying what there is.
    """
    root = pathlib.Path(folder).expanduser()
    if root.is_file():
        found = [(root, root.name)] if kind_of(root.name) else []
        others = Counter() if found else Counter([root.suffix.lower() or root.name])
    elif root.is_dir():
        found, others = _walk(root)
    else:
        raise errors.invalid("DIR", str(folder), "a folder with documents that exists, or one document")
    suffixes = ", ".join(s for known in KINDS.values() for s in known)
    if not found:
        there = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(_SHOWN)) or "no file"
        accepted = f"a folder with files that end in {suffixes}; there {'are' if others.total() > 1 else 'is'} {there}"
        rows = [s for s in others if s in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")]
        if rows:
            accepted += f"; `qlorad dataset upload` takes {', '.join(sorted(rows))}"
        raise errors.invalid("DIR", str(folder), accepted)
    if len(found) > MOST:
        raise errors.invalid("DIR", f"{folder} with {len(found)} documents", f"at most {MOST}; take a folder below it")
    full = tuple((path, name) for path, name in found if path.stat().st_size)
    if not full:
        raise errors.invalid("DIR", str(folder), f"documents with text; {found[0][1]} is empty")
    return Documents(full, others, tuple(name for path, name in found if not path.stat().st_size))


def _walk(root: pathlib.Path) -> tuple[list[tuple[pathlib.Path, str]], Counter[str]]:
    found: list[tuple[pathlib.Path, str]] = []
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        raise errors.invalid("DIR", str(error.filename), f"folders that can be read ({error.strerror})") from None

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        others["link to a folder"] += sum(pathlib.Path(folder, name).is_symlink() for name in folders)
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            if name.startswith("."):
                continue
            if kind_of(name) and path.is_file():
                if any(0xD800 <= ord(c) < 0xE000 for c in str(path.relative_to(root))):
                    raise errors.invalid("DIR", ascii(str(path)), "documents whose names are UTF-8")
                found.append((path, path.relative_to(root).as_posix()))
            else:
                others[path.suffix.lower() or name] += 1
    return found, +others
