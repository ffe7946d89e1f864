"""Quantised weights that engines keep for their next load: those of models that are gone go too.

Law of this room: names folders only; what is in them is the engine's (see worker/prepared).
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Collection

FOLDER = "prepared"


def sweep(folder: pathlib.Path, models: Collection[str]) -> list[str]:
    """Removes what belongs to no model of these hex digests, and what was never finished; the names of what went.

    Only while no engine runs.
    """
    gone = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.name.partition("-")[0] not in models:
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
    return gone
