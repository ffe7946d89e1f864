"""The process that reads documents: one after the other, each with bounds of its own.

Law of this room: as the ingest worker's, whose orders it works on; it ends when
that does. Bounds of memory and CPU time are this process's own, so that a
document which breaks them ends nobody else.
"""

from __future__ import annotations

import os
import pathlib
import queue
import resource
import threading
import traceback
from collections import Counter
from typing import Any

import orjson

from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import language
from services.datasets.worker.bound import Bench
from services.datasets.worker.documents import bounds, kinds, left
from services.datasets.worker.documents.analyse import Found, analyse, texts
from services.datasets.worker.documents.blocks import ITEM, PROSE, Document
from services.datasets.worker.found import Unreadable

_LANGUAGE_CHARACTERS = 4000
_MOST_FOUND_BYTES = 48 << 20


def read(data: bytes, filename: str, as_texts: bool) -> tuple[Document, Found]:
    """A document, and what was found in it."""
    document = kinds.read(data, filename)
    return document, texts(document) if as_texts else analyse(document, language_of(document))


def language_of(document: Document) -> str:
    """The language of its prose."""
    said, size = [], 0
    for block in document.blocks:
        if block.kind in (PROSE, ITEM) and not block.left:
            said.append(block.text)
            size += len(block.text)
            if size > _LANGUAGE_CHARACTERS:
                break
    return language.of_text("\n".join(said)[:_LANGUAGE_CHARACTERS])


def told(document: Document, found: Found) -> bytes:
    """What was found, for the ingest worker."""
    rows: list[Any] = []
    for item in found.items:
        row: dict[str, Any] = {"text": item.answer}
        if item.question:
            asked, answered = {"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}
            row = {"messages": [asked, answered], "rule": item.rule}
        if item.section:
            row["section"] = item.section
        rows.append((item.spans[0].first, row, [span.plain() for span in item.spans]))
    findings = sorted([*document.said, *left.findings(document.blocks, found.left)], key=lambda f: f[0])
    return orjson.dumps(
        {
            "rows": rows,
            "findings": [(at, p.rule, p.message, p.hint, p.field, int(p.severity)) for at, p in findings],
            "items": Counter(item.rule for item in found.items),
            "left": Counter(found.left.values()),
        }
    )


def report(order: ingest_pb2.DocumentOrder) -> ingest_pb2.DocumentReport:
    """What became of a document."""
    try:
        path = pathlib.Path(order.path)
        if path.stat().st_size > bounds.MAX_BYTES:
            raise bounds.too_large(f"{path.stat().st_size} bytes", f"at most {bounds.MAX_BYTES} bytes")
        document, found = read(path.read_bytes(), order.filename, order.as_texts)
        data = told(document, found)
        if len(data) > _MOST_FOUND_BYTES:
            raise bounds.too_large(f"{len(data)} bytes of items", f"at most {_MOST_FOUND_BYTES} bytes of items")
        return ingest_pb2.DocumentReport(kind=document.kind, found_json=data)
    except Unreadable as e:
        problem, line = e.problem, e.line
    except RecursionError:
        problem, line = bounds.too_deep().problem, 0
    except ImportError as e:
        traceback.print_exc()
        if "failed to map" not in str(e) and "allocate memory" not in str(e):
            raise  # the installation is at fault, and no document
        problem, line = bounds.out_of_memory(order.memory_bytes), 0
    except MemoryError:
        problem, line = bounds.out_of_memory(order.memory_bytes), 0
    except Exception as e:  # a reader of a library, on bytes that nobody thought of
        traceback.print_exc()
        problem, line = bounds.broken(f"its reader ended with {type(e).__name__}"), 0
    return ingest_pb2.DocumentReport(rule=problem.rule, message=problem.message, hint=problem.hint, line=line)


def bound(order: ingest_pb2.DocumentOrder) -> None:
    """Takes the order's bounds upon this process; those of the worker stay above them."""
    for which, most in ((resource.RLIMIT_AS, order.memory_bytes), (resource.RLIMIT_CPU, _until(order.cpu_seconds))):
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _until(seconds: int) -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime) + 1 + seconds


def main() -> None:
    bench = Bench.open(is_watched=False)
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    orders.put(bench.order)

    def listen() -> None:
        while (body := bench.line.receive()) is not None:
            orders.put(body)
        os._exit(0)  # in the middle of a document too: nobody waits for it

    threading.Thread(target=listen, daemon=True, name="worker-watch").start()
    while True:
        order = ingest_pb2.DocumentOrder.FromString(orders.get())
        bound(order)
        bench.send(report(order))


if __name__ == "__main__":
    main()
