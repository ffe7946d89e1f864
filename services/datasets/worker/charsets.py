"""Texts of the web as UTF-8.

Law of this room: a mark at the beginning says the charset, else the server,
else the page itself, else it is UTF-8. Bytes that are not what was said are
refused with the place of the first; nothing is guessed and nothing replaced.
"""

from __future__ import annotations

import codecs
import os
import pathlib
import re

from services.datasets.web_rules import Page
from services.datasets.worker import charset_names
from services.datasets.worker.card import unusable
from services.datasets.worker.pages import Kind

_PIECE = 1 << 20
_HEAD_BYTES = 4096
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.I)
ACCEPTED = "a page whose bytes are of the charset that it tells; or download it, save it as UTF-8, and upload it"


def to_utf8(path: pathlib.Path, told: str, kind: Kind, page: Page) -> None:
    """Makes the file UTF-8 in place; INVALID_ARGUMENT where its bytes are not of its charset."""
    with path.open("rb") as f:
        head = f.read(_HEAD_BYTES)
    codec = _codec(head, told, kind, page)
    part = path.with_name(f"{path.name}.utf8")
    decode, done = codecs.getincrementaldecoder(codec)(), 0
    with path.open("rb") as f, part.open("wb") as out:
        if kind.is_html and (codec != "utf-8" or _META.search(head)):
            out.write(codecs.BOM_UTF8)  # which says more than the charset that the page tells of itself
        while True:
            data = f.read(_PIECE)
            begun = done - len(decode.getstate()[0])
            try:
                out.write(decode.decode(data, final=not data).encode())
            except UnicodeError as e:
                at = f" (byte {begun + e.start})" if isinstance(e, UnicodeDecodeError) and e.start >= 0 else ""
                given = f"{page.url_without_query}, which is not {codec.removesuffix('-sig')}, as it tells{at}"
                raise unusable("web.urls", given, ACCEPTED) from None
            done += len(data)
            if not data:
                break
    os.replace(part, path)


def _codec(head: bytes, told: str, kind: Kind, page: Page) -> str:
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return codec
    codec = "utf-8"
    if told:
        codec = charset_names.codec_of(told)
    elif kind.is_html and (found := _META.search(head)):
        told = found[1].decode()
        codec = charset_names.of_meta(told)
    if not codec:
        raise unusable("web.urls", f"{page.url_without_query} in the charset {told!r}", "UTF-8, or a usual charset")
    return codec
