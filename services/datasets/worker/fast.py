"""The most common rows, read quickly: those about which nothing needs to be said.

Law of this room: pure. A row that is read here is read the same by forms.py,
without a problem, no rule speaks against it, and its line is the one that
canonical.line_of would write, byte for byte; every other row is None here, and
the plain way tells what it is. A million rows pass: no loop here is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import orjson

from qlorad.v1 import datasets_pb2
from services.datasets.forms import Form
from services.datasets.worker import glance
from services.datasets.worker.limits import MAX_ROW_BYTES
from services.datasets.worker.plain import hash_of
from services.datasets.worker.strict_json import EXACT, LONG_BYTES, has_blank_colon, parsed

Quick: TypeAlias = tuple[bytes, bytes, int, int]
"""A row that was read: its canonical line, hash of its content, characters, and words of what it teaches."""
_Parsed: TypeAlias = tuple[bytes, Sequence[str], bytes, str, int]
"""Beginning of the line; texts and shape, as plain.weigh joins them; what is taught; keys of the row in all."""
Read: TypeAlias = Callable[[dict[str, Any]], "_Parsed | None"]

_MORE_THAN_METADATA = ("system", "history", "functions", "conversations", "conversation")
_QUESTION_AND_ANSWER = b"ROLE_USER\0ROLE_ASSISTANT"
_BEGIN = b'{"chat":{"messages":[{"parts":[{"text":'
_SECOND = b'},{"text":'
_AS_SYSTEM = b'}],"role":"ROLE_SYSTEM"}'
_AS_USER = b'}],"role":"ROLE_USER"}'
_AS_ASSISTANT = b'}],"role":"ROLE_ASSISTANT"}'
_NEXT = b',{"parts":[{"text":'
_END = b"]}"
_loads, _dumps = orjson.loads, orjson.dumps


def read(form: Read, name: str, number: int, lines: Sequence[bytes | None]) -> list[Quick | None]:
    """For each line of a file, numbered from `number`, its row; None where the plain way is to look."""
    found = _parsed_all(form, lines)
    joined = ["" if row is None else "\0".join(row[1]) for row in found]
    said = [text.encode() for text in joined]
    taught = _words(["" if row is None else row[3] for row in found])
    origin = b',"origin":{"file":' + _dumps(name) + b',"line":"'
    rows: list[Quick | None] = []
    for row, text, data, look, words in zip(found, joined, said, _looks(said), taught, strict=True):
        if row is None or look:
            rows.append(None)
        else:
            begin, texts, shape, _, _ = row
            line = b"".join((begin, origin, b"%d" % (number + len(rows)), b'"}}'))
            rows.append((line, hash_of(data, shape), len(text) - len(texts) + 1, words))
    return [row if row is None or len(row[0]) <= MAX_ROW_BYTES else None for row in rows]


def _looks(said: Sequence[bytes]) -> Sequence[bool]:
    """Of which texts a rule may speak; all at once where it speaks of none."""
    if not glance.is_worth_a_look(b"\n".join(said)):
        return [False] * len(said)
    return list(map(glance.is_worth_a_look, said))


def _words(texts: Sequence[str]) -> list[int]:
    """plain.words of each: no text of a row that is read here has a blank that is not one byte of those below."""
    data = [text.encode() for text in texts]
    begins = np.cumsum([0, *(len(d) + 1 for d in data[:-1])])
    is_blank = np.frombuffer(b"\n".join((*data, b"", b"")), np.uint8) <= 32
    is_end = is_blank[1:] > is_blank[:-1]
    found: list[int] = np.add.reduceat(is_end.view(np.int8), begins, dtype=np.int64).tolist()
    return found


def _parsed_all(form: Read, lines: Sequence[bytes | None]) -> list[_Parsed | None]:
    """Lines as rows of the form, without those that need a closer look at how they are written."""
    found = [None if line is None else _parsed(form, line) for line in lines]
    if None not in found:
        # Each key has a colon: where there are as many as keys in all, no row has one too many.
        whole = b"\n".join(lines)  # type: ignore[arg-type]
        if whole.count(b":") == sum(row[4] for row in found if row) and not _has_escape(whole):
            return found
    return [
        row if row and line and _is_plainly_written(line, row[4]) else None
        for row, line in zip(found, lines, strict=True)
    ]


def _parsed(form: Read, line: bytes) -> _Parsed | None:
    try:
        row = parsed(line) if len(line) > LONG_BYTES else _loads(line)
    except orjson.JSONDecodeError:
        return None
    return form(row) if type(row) is dict else None


def _is_plainly_written(line: bytes, keys: int) -> bool:
    """Whether no key stands twice, which shows in the count of colons as strict_json says, and nothing is escaped."""
    colons = line.count(b":")
    if colons != keys and (colons < keys or line.count(b'":') != keys or has_blank_colon(line)):
        return False
    return not _has_escape(line)


def _has_escape(data: bytes) -> bool:
    """Whether there is one, behind which may be half a character, or a key that looks like another."""
    return b"\\" in data and b"\\u" in data


def instruction(row: dict[str, Any]) -> _Parsed | None:
    """{"instruction", "input", "output"} with texts, and plain values beside them. Takes the row apart."""
    keys = len(row)
    question, answer, given = row.pop("instruction", None), row.pop("output", None), row.pop("input", "")
    if type(question) is not str or type(answer) is not str or type(given) is not str:
        return None
    if not question or not answer or question[0] <= " " or answer[0] <= " " or answer[-1] <= " ":
        return None
    if question.isspace() or answer.isspace():  # there are blanks beyond ASCII, and a text of nothing else is empty
        return None
    more = _metadata(row) if row else b""
    if more is None:
        return None
    if given:
        if given[-1] <= " ":
            return None
        given = "\n\n" + given
        asked, question = _dumps(question) + _SECOND + _dumps(given), question + given
    elif question[-1] <= " ":
        return None
    else:
        asked = _dumps(question)
    line = b"".join((_BEGIN, asked, _AS_USER, _NEXT, _dumps(answer), _AS_ASSISTANT, _END, more))
    return line, (question, answer), _QUESTION_AND_ANSWER, answer, keys


def chat(row: dict[str, Any]) -> _Parsed | None:
    """{"messages"} of texts by user and assistant in turn, perhaps after a system's. Takes the row apart."""
    keys = len(row)
    told = row.pop("messages", None)
    if type(told) is not list or not told or "tools" in row:
        return None
    pieces: list[bytes] = []
    said: list[str] = []
    shape: list[str] = []
    taught: list[str] = []
    expected = "user"
    for message in told:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not content or content[0] <= " " or content[-1] <= " " or content.isspace():
            return None
        pieces += (_NEXT, _dumps(content))
        if role == "system" and not said:
            pieces.append(_AS_SYSTEM)
            shape.append("ROLE_SYSTEM")
        elif role != expected:
            return None
        elif role == "user":
            expected = "assistant"
            pieces.append(_AS_USER)
            shape.append("ROLE_USER")
        else:
            expected = "user"
            pieces.append(_AS_ASSISTANT)
            shape.append("ROLE_ASSISTANT")
            taught.append(content)
        said.append(content)
    if shape[-1] != "ROLE_ASSISTANT":
        return None
    more = _metadata(row) if row else b""
    if more is None:
        return None
    pieces[0] = _BEGIN
    return b"".join((*pieces, _END, more)), said, "\0".join(shape).encode(), "\n".join(taught), keys + 2 * len(told)


def _metadata(row: dict[str, Any]) -> bytes | None:
    """What else a row has, as its line says it; None where that needs more than keeping."""
    for key, value in row.items():
        kind = type(value)
        if kind is int:
            if not -EXACT <= value <= EXACT:
                return None
        elif kind is not str and kind is not bool and value is not None:
            return None
        if key in _MORE_THAN_METADATA:
            return None
    return b',"metadata":' + _dumps(row, option=orjson.OPT_SORT_KEYS)


READERS: Mapping[Form, Read] = {
    datasets_pb2.ROW_FORMAT_INSTRUCTION: instruction,
    datasets_pb2.ROW_FORMAT_CHAT: chat,
}
