"""How long a row may be, and the problems of bytes that are no row.

Law of this room: pure.
"""

from __future__ import annotations

from services.datasets.worker.found import Problem

MAX_ROW_BYTES = 8 << 20


def too_long(unit: str = "line") -> Problem:
    """The problem of a row above the limit."""
    return Problem(
        "line_too_long", f"the {unit} is longer than {MAX_ROW_BYTES} bytes", "split the row, or leave it out"
    )


def not_utf8(error: UnicodeDecodeError) -> Problem:
    """The problem of bytes that are not UTF-8."""
    byte = error.object[error.start]
    return Problem("not_utf8", f"byte 0x{byte:02x} at {error.start} of the row is not UTF-8", "save the file as UTF-8")
