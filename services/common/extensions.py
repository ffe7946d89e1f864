"""Where compiled parts lie that set-up has built.

Law of this room: tells the place only. Nothing is compiled while a daemon or a worker runs.
"""

from __future__ import annotations

import hashlib
import pathlib


def extensions_folder(told: str, prefix: str) -> pathlib.Path:
    """As told, else a folder of this Python environment.

    Environments must not share one: the compiler is told their paths, so each would build anew what the other built.
    """
    own = f"~/.cache/qlorad/torch_extensions/{hashlib.sha256(prefix.encode()).hexdigest()[:12]}"
    return pathlib.Path(told or own).expanduser().absolute()
