"""A DOCX as the zip archive that it is: its parts, read within bounds, and XML that declares nothing.

Law of this room: no part is believed about its size; what unpacks to more than
it may is refused before it is whole.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from services.datasets.worker.documents import bounds
from services.datasets.worker.found import Problem, Unreadable, clip

_CHUNK = 1 << 18


class Package:
    """The parts of a DOCX."""

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            names = self._zip.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, UnicodeDecodeError) as e:
            if b"PK\x05\x06" not in data[-65_600:]:
                told = "the zip archive that a DOCX is has no end: it was cut off"
                raise Unreadable(Problem("truncated_document", told, "fetch or save it anew")) from None
            raise Unreadable(bounds.broken(str(e))) from None
        if len(names) > bounds.MAX_PARTS:
            raise bounds.too_large(f"{len(names)} parts", f"at most {bounds.MAX_PARTS}")
        if len(set(names)) != len(names):
            raise Unreadable(bounds.broken("a part of it stands twice"))
        self._names = set(names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def part(self, name: str) -> bytes:
        """The bytes of a part. Unreadable if it is damaged, or unpacks to too much."""
        info = self._zip.getinfo(name)
        if info.flag_bits & 1:
            hint = "unpack it with its password and save it without one"
            raise Unreadable(Problem("encrypted", f"{clip(name)} in it is encrypted", hint))
        most = min(bounds.MAX_PART_BYTES, max(1 << 20, bounds.MAX_RATIO * info.compress_size))
        pieces, size = [], 0
        try:
            with self._zip.open(info) as f:
                while piece := f.read(_CHUNK):
                    pieces.append(piece)
                    size += len(piece)
                    if size > most:
                        told = f"{clip(name)} in it: {info.compress_size} packed bytes unpack to {size} and more"
                        raise Unreadable(Problem("packed_bomb", told, "save the document anew"))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError) as e:
            raise Unreadable(bounds.broken(f"{clip(name)} in it: {e}")) from None
        return b"".join(pieces)


class Target:
    """What hears the elements of a part, in order. Tags are without their namespace, but for those of drawings."""

    depth = 0

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        """Refuses: no part of a DOCX has one, and a bomb begins so."""
        told = "its XML declares a document type, as no DOCX does and XML bombs do"
        raise Unreadable(Problem("xml_entities", told, "save the document anew with the program that made it"))

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.depth += 1
        if self.depth > 4 * bounds.MAX_NESTING:
            raise bounds.too_deep(4 * bounds.MAX_NESTING)
        self.begin(local(tag), {local(name): value for name, value in attributes.items()})

    def end(self, tag: str) -> None:
        self.depth -= 1
        self.finish(local(tag))

    def data(self, text: str) -> None:
        """Text of the element that is open."""

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        """An element begins."""

    def finish(self, tag: str) -> None:
        """An element ends."""

    def close(self) -> None:
        """The part ends."""


def local(tag: str) -> str:
    """A name without its namespace; but those of drawings, which have paragraphs of their own kind, keep it."""
    return tag if "/drawingml/" in tag else tag.rpartition("}")[2]


def hear(package: Package, name: str, target: Target) -> None:
    """Lets a target hear a part. Unreadable where that is no XML."""
    parser: Any = ElementTree.XMLParser(target=target)
    try:
        parser.feed(package.part(name))
        parser.close()
    except ElementTree.ParseError as e:
        raise Unreadable(bounds.broken(f"{clip(name)} in it is no XML: {e}")) from None
