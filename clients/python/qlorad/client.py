"""The client: the way to all four daemons.

Made from aio/client.py by clients/python/unasync.py; change that file.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from qlorad import _connection
from qlorad._connection import Connection
from qlorad._wire import Wire
from qlorad.adapters import Adapters
from qlorad.datasets import Datasets
from qlorad.inference import Inference
from qlorad.jobs import Jobs
from qlorad.models import Models


def connect(
    *,
    home: str | os.PathLike[str] | None = None,
    datasets: str = "",
    registry: str = "",
    trainer: str = "",
    inference: str = "",
    ca: str = "",
    cert: str = "",
    key: str = "",
    tls: bool | None = None,
    token: str | None = None,
) -> Client:
    """A client; channels are opened when first used.

    Addresses: the argument, else QLORAD_DATASETS_ADDRESS (and so on), else what
    the daemon told in the home's state/run, else 127.0.0.1:50051 to 50054.
    TLS: `ca`, `cert` and `key` are PEM files (or QLORAD_TLS_CA, QLORAD_TLS_CERT,
    QLORAD_TLS_KEY); `tls=True` alone trusts the system's CAs. The token is the
    argument, else QLORAD_TOKEN; it goes over TLS or loopback only.
    Does not check that a daemon answers.
    """
    addresses = {"datasets": datasets, "registry": registry, "trainer": trainer, "inference": inference}
    return Client(_connection.connection(home, addresses, ca, cert, key, tls, token))


class Client:
    """All services of one house. Close it, or use it in `with`."""

    def __init__(self, connection: Connection) -> None:
        self.home = connection.home
        self.wires = {service: Wire(connection, service) for service in _connection.SERVICES}
        self.datasets = Datasets(self.wires["datasets"])
        self.models = Models(self.wires["registry"])
        self.adapters = Adapters(self.wires["registry"])
        self.jobs = Jobs(self.wires["trainer"])
        self.inference = Inference(self.wires["inference"])

    def close(self) -> None:
        """Closes every channel."""
        for wire in self.wires.values():
            wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
