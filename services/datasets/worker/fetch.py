"""The fetch worker: files of a hub, a folder, the web or a collection, found, brought and checked.

Law of this room: it talks to servers that others fill, so it is bounded, writes
only in the folder of its order, and ends when the daemon does. Its settings of
a library come from the order alone, never from who started the daemon, and a
library is loaded only for the source that needs it.
"""

from __future__ import annotations

import os
import time

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import folder
from services.datasets.worker.bound import Bench

_SECONDS_BETWEEN = 0.2


def settle(order: ingest_pb2.FetchOrder) -> None:
    """Tells the hub's library where it is; it listens only while it is imported."""
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ.update(
        HF_ENDPOINT=order.endpoint,
        HF_HOME=os.path.join(order.into, "home"),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def main() -> None:
    bench = Bench.open()
    order = ingest_pb2.FetchOrder.FromString(bench.order)
    told_at = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= _SECONDS_BETWEEN:
            told_at = now
            progress = datasets_pb2.StageProgress(stage="fetch", done=done, total=total)
            bench.send(ingest_pb2.FetchReport(progress=progress))

    with bench.refusing(lambda refusal: bench.send(ingest_pb2.FetchReport(refusal=refusal))):
        source = order.WhichOneof("source")
        if source == "folder":
            done = folder.fetch(order, tell)
        elif source == "web":
            from services.datasets.worker import web

            done = web.fetch(order, tell)
        elif source == "chroma":
            from services.datasets.worker import chroma

            done = chroma.fetch(order, tell)
        else:
            settle(order)
            from services.datasets.worker import hub

            done = hub.fetch(order, tell)
        bench.send(ingest_pb2.FetchReport(done=done))


if __name__ == "__main__":
    main()
