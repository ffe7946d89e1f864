"""Characters that do not belong in a text, and what a text is without them.

Law of this room: pure. Each fault has a rule and, where there is one, a repair
of the same text that changes nothing else and finds nothing to do a second time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from services.datasets import repairs
from services.datasets.worker.found import INFO, WARNING, Problem
from services.datasets.worker.plain import Plain, conversations, text_of, texts

BLANKS = " \t\n\r\f\v"
_KEPT = b"\0\t\n"
CONTROLS = bytes(n for n in (*range(1, 32), 127) if n not in _KEPT)
"""Of one byte each. CR is among them: a text without any needs no closer look. NUL is refused where rows are read."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_BYTES = re.compile(b"\xc2[\x80-\x84\x86-\x9f]")
"""Those of two bytes, in UTF-8."""
_MAX_ROUNDS = 4
# What bytes 0x80 to 0xBF look like to one who takes them for Latin-1 or Windows-1252.
_FOLLOWS = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_RUN = re.compile(f"(?:[Â-ß][{_FOLLOWS}]|[à-ï][{_FOLLOWS}]{{2}}|[ð-ô][{_FOLLOWS}]{{3}})+")
_LEAD = re.compile(b"\xc3[\x82-\xb4][\xc2\xc5\xc6\xcb\xe2]")
"""The first two characters of a run, in UTF-8."""
_SURE = re.compile(f"[ÂÃ][{_FOLLOWS}]|â[€‚„]|ï»¿|ï¿½|ðŸ")
"""How one misread character begins that nobody writes; of others it takes two in a row."""


def is_worth_a_look(data: bytes) -> bool:
    """Whether a closer look can find anything: given texts as UTF-8."""
    if len(data.translate(None, CONTROLS)) != len(data):
        return True
    if data.isascii():
        return False
    # Each begins with a byte that is looked for at the speed of memory.
    if b"\xef" in data and (b"\xef\xbf\xbd" in data or b"\xef\xbb\xbf" in data):
        return True
    return (b"\xc3" in data and _LEAD.search(data) is not None) or (
        b"\xc2" in data and _CONTROL_BYTES.search(data) is not None
    )


def without_line_ends(text: str) -> str:
    """LF alone ends lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def without_marks(text: str) -> str:
    """No byte order mark."""
    return text.replace("\ufeff", "")


def without_controls(text: str) -> str:
    """No control character but tab, LF and CR. In what was misread they are halves of others, and stay."""
    if text.isascii() or not _CONTROL.search(text):
        return _CONTROL.sub("", text)
    return "".join(piece if is_misread else _CONTROL.sub("", piece) for _, piece, is_misread in _pieces(text))


def _pieces(text: str) -> Iterator[tuple[int, str, bool]]:
    """The text in pieces, with where each begins, and whether it was misread."""
    after = 0
    for match in _RUN.finditer(text):
        if _reread(match) != match[0]:
            yield after, text[after : match.start()], False
            yield match.start(), match[0], True
            after = match.end()
    yield after, text[after:], False


def read_again(text: str) -> str:
    """What was UTF-8 and taken for Latin-1 or Windows-1252, read as UTF-8; all else as it is."""
    for _ in range(_MAX_ROUNDS):
        again = _RUN.sub(_reread, text) if not text.isascii() else text
        if again == text:
            break
        text = again
    return text


def _reread(match: re.Match[str]) -> str:
    run = match[0]
    try:
        said = b"".join(bytes([ord(c)]) if ord(c) < 256 else c.encode("cp1252") for c in run).decode()
    except UnicodeDecodeError:
        return run
    before = match.string[match.start() - 1] if match.start() else ""
    # MANHÃ” and CAFÉ… are words in capitals before a quote, not misread bytes.
    is_sure = len(said) > 1 or (_SURE.match(run) is not None and not before.isupper())
    return said if is_sure else run


TEXT_REPAIRS: Mapping[str, Callable[[str], str]] = {
    repairs.MOJIBAKE: read_again,
    repairs.LINE_ENDS: without_line_ends,
    repairs.BYTE_ORDER_MARKS: without_marks,
    repairs.CONTROL_CHARACTERS: without_controls,
}
"""In the order in which they are done: what was misread may hold what the others look for."""


def scan(example: Plain) -> list[Problem]:
    """What of a row's characters looks wrong."""
    return [problem for place, text in texts(example) for problem in _faults(place, text)]


def _faults(place: str, text: str) -> Iterator[Problem]:
    if "\r" in text:
        told = f"lines end in CR, {text.count(chr(13))} times"
        hint = "end lines with LF, or a model learns both"
        yield Problem("carriage_return", told, hint, place, INFO, repairs.LINE_ENDS)
    if "\ufeff" in text:
        told = f"holds a byte order mark at character {text.index(chr(0xFEFF))}"
        yield Problem("byte_order_mark_in_text", told, "take it out", place, WARNING, repairs.BYTE_ORDER_MARKS)
    controls = ((begin, _CONTROL.search(piece)) for begin, piece, is_misread in _pieces(text) if not is_misread)
    if control := next(((begin + m.start(), m[0]) for begin, m in controls if m), None):
        told = f"holds the control character U+{ord(control[1]):04X} at character {control[0]}"
        yield Problem("control_character", told, "take it out", place, WARNING, repairs.CONTROL_CHARACTERS)
    if text.isascii():
        return
    if "\ufffd" in text:
        told = f"holds {text.count(chr(0xFFFD))} of U+FFFD, which stands for characters that were lost"
        yield Problem("replacement_character", told, "read the source again, in its own encoding", place, WARNING)
    misread = [m for m in _RUN.finditer(text) if _reread(m) != m[0]]
    if misread:
        told = f"UTF-8 read as Latin-1: {misread[0][0]!r} for {_reread(misread[0])!r}, {len(misread)} in all"
        hint = "read the source as UTF-8"
        yield Problem("mojibake", told, hint, place, WARNING, repairs.MOJIBAKE)


def outer_blanks(example: Plain) -> Iterator[Problem]:
    """Turns that begin or end with blanks."""
    for path, messages in conversations(example):
        for i, message in enumerate(messages):
            text = text_of(message)
            if text and text.strip(BLANKS) and (text[0] in BLANKS or text[-1] in BLANKS):
                where = "begins" if text[0] in BLANKS else "ends"
                hint = "a model learns them; take them out"
                place = f"{path}[{i}].content"
                yield Problem("outer_blanks", f"{where} with blanks", hint, place, INFO, repairs.BLANKS)
