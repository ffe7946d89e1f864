"""Removing from the shelf, for a call that may run twice.

Law of this room: the shelf decides; here is only what a second run means.
"""

from __future__ import annotations

from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.shelf import Shelf


def remove(shelf: Shelf, collection: str, ident: str, again: bool) -> int:
    """Removes from the shelf; what a cut-off call of the same request removed already counts as removed."""
    try:
        return shelf.remove(collection, ident)
    except Fault as fault:
        if again and fault.reason == errors_pb2.REASON_NOT_FOUND:
            return 0
        raise
