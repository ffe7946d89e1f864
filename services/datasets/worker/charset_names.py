"""The charsets of the web, by the names that pages give them.

Law of this room: pure. A codec of Python that is no charset of texts is none
here: some take a time that grows with the square of what they read.
"""

from __future__ import annotations

import codecs

# By the names that Python has for them.
_KNOWN = frozenset(
    "utf-8 ascii utf-16 utf-16-le utf-16-be iso8859-1 iso8859-2 iso8859-3 iso8859-4 iso8859-5 iso8859-6 iso8859-7 "
    "iso8859-8 iso8859-10 iso8859-13 iso8859-14 iso8859-15 iso8859-16 cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 "
    "cp1257 cp1258 cp866 cp874 koi8-r koi8-u mac-roman gb2312 gbk gb18030 big5 euc_jp iso2022_jp shift_jis cp932 cp949 "
    "euc_kr".split()
)


def codec_of(told: str) -> str:
    """The codec that a charset's name means; "" for none that is known. The name is not empty."""
    try:
        codec = codecs.lookup(told).name
    except (LookupError, ValueError):
        return ""
    if codec not in _KNOWN:
        return ""
    # Browsers read the first as the second, and so do those who write it.
    return {"iso8859-1": "cp1252"}.get(codec, codec)


def of_meta(told: str) -> str:
    """As codec_of, for what a page tells of itself: UTF-16 cannot be told in ASCII, so UTF-8 is meant."""
    if told.lower().startswith("utf-16"):
        return "utf-8"
    codec = codec_of(told)
    return "cp1252" if codec == "ascii" else codec
