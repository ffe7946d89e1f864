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
from services.datasets.worker.card import unusable
from services.datasets.worker.pages import Kind

_PIECE = 1 << 20
_HEAD_BYTES = 4096
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.I)
# The charsets of the web, by the names that Python has for them.
_KNOWN = frozenset(
    "utf-8 ascii utf-16 utf-16-le utf-16-be iso8859-1 iso8859-2 iso8859-3 iso8859-4 iso8859-5 iso8859-6 iso8859-7 "
    "iso8859-8 iso8859-10 iso8859-13 iso8859-14 iso8859-15 iso8859-16 cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 "
    "cp1257 cp1258 cp866 cp874 koi8-r koi8-u mac-roman gb2312 gbk gb18030 big5 euc_jp iso2022_jp shift_jis cp932 cp949 "
    "euc_kr".split()
)
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
    if not told and kind.is_html and (found := _META.search(head)):
        told = found[1].decode()
        told = "utf-8" if told.lower().startswith("utf-16") else told  # what tells it in ASCII is not that
    if not told:
        return "utf-8"
    try:
        codec = codecs.lookup(told).name
    except (LookupError, ValueError):
        codec = ""
    if codec not in _KNOWN:
        raise unusable("web.urls", f"{page.url_without_query} in the charset {told!r}", "UTF-8, or a usual charset")
    # Browsers read the first as the second, and so do those who write it.
    return {"iso8859-1": "cp1252"}.get(codec, codec)
