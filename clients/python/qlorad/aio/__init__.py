"""The asyncio client: `client = qlorad.aio.connect()`.

Law of this room: the logic of the client stands here, once; the plain modules
beside this folder are made from these by clients/python/unasync.py.
"""

from __future__ import annotations

from qlorad.aio.client import Client, connect

__all__ = ["Client", "connect"]
