"""The client of qlorad: `qlorad.connect()` for plain code, `qlorad.aio.connect()` for asyncio.

Law of this room: importing the package loads nothing; each name is loaded when
it is first touched, so the generated stubs under `qlorad.v1` cost only protobuf.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlorad import aio as aio
    from qlorad import errors as errors
    from qlorad.client import Client as Client
    from qlorad.client import connect as connect
    from qlorad.errors import QloradError as QloradError

__version__ = "0.1.0.dev0"

_LAZY = {
    "connect": ("qlorad.client", "connect"),
    "Client": ("qlorad.client", "Client"),
    "QloradError": ("qlorad.errors", "QloradError"),
    "aio": ("qlorad.aio", None),
    "errors": ("qlorad.errors", None),
}

__all__ = ["Client", "QloradError", "__version__", "aio", "connect", "errors"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qlorad' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
