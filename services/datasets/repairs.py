"""The repairs that may be asked for.

Law of this room: pure; names and what each does. A worker does them.
"""

from __future__ import annotations

from collections.abc import Mapping

REPAIRS: Mapping[str, str] = {}
"""What each does, for people."""
