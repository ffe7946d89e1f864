"""The ledger worker: makes a ledger, sends rows of one, or measures a dataset.

Law of this room: it only calls common/prompt; what a training row is, is decided
there. The tokenizer may use every core here, since nothing else runs.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable

from google.protobuf.message import Message

from qlorad.v1 import datasets_pb2
from services.common import facts
from services.common.errors import invalid_field
from services.common.frames.v1 import ingest_pb2
from services.common.prompt import ledger, measure
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from services.datasets.worker.bound import Bench

_SECONDS_BETWEEN = 0.2
_BATCH_ROWS = 64
_BATCH_TOKENS = 65536


Send = Callable[[ingest_pb2.LedgerReport], None]


def build(shelf: Shelf, work: ingest_pb2.LedgerBuild, send: Send) -> None:
    """Makes the ledger and sends it."""
    dataset = shelf.open("datasets", work.dataset_digest, field="dataset")
    model = shelf.open("models", work.model_digest, field="model")
    sealed = ledger.build(
        shelf, dataset, model, work.max_length_tokens, work.over_length, _telling(send), work.prompt_format
    )
    send(ingest_pb2.LedgerReport(ledger=ledger.LedgerReader.open(sealed).proto()))


def count(shelf: Shelf, work: ingest_pb2.LedgerMeasure, send: Send) -> None:
    """Measures a dataset and sends what was found."""
    dataset = shelf.open("datasets", work.dataset_digest, field="dataset")
    model = shelf.open("models", work.model_digest, field="model")
    told = facts.from_manifest(facts.ModelFacts, model.manifest)
    lengths = list(work.max_length_tokens) or measure.usual_lengths(told.context_tokens)
    if wrong := [n for n in lengths if n > told.context_tokens]:
        raise invalid_field("max_length_tokens", wrong[0], f"1 to {told.context_tokens}, the model's context")
    renderer = Renderer.open(model.payload, told.template_date, work.prompt_format)
    made = measure.measure(dataset.payload, renderer, Tokenizer.open(model.payload), lengths, _telling(send))
    made.dataset_digest, made.model_digest = dataset.digest, model.digest
    send(ingest_pb2.LedgerReport(measure=made))


def _telling(send: Send) -> Callable[[str, int, int], None]:
    """Sends progress, not too often."""
    told_at = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= _SECONDS_BETWEEN:
            told_at = now
            progress = datasets_pb2.StageProgress(stage=stage, done=done, total=total)
            send(ingest_pb2.LedgerReport(progress=progress))

    return tell


def read(shelf: Shelf, request: datasets_pb2.ReadLedgerRequest, send: Send) -> None:
    """Sends the rows asked for, in order."""
    rows = ledger.LedgerReader.open(shelf.open("datasets", request.ledger, field="ledger")).split(request.split)
    if request.first_row > len(rows):
        raise invalid_field("first_row", request.first_row, f"0 to {len(rows)}")
    end = min(len(rows), request.first_row + (request.max_rows or len(rows)))
    batch, tokens = datasets_pb2.ReadLedgerResponse(), 0
    for number in range(request.first_row, end):
        row = rows.row(number)
        batch.rows.append(row)
        tokens += len(row.ids) + len(row.cut_ids)
        if len(batch.rows) >= _BATCH_ROWS or tokens >= _BATCH_TOKENS:
            send(ingest_pb2.LedgerReport(rows=batch))
            batch, tokens = datasets_pb2.ReadLedgerResponse(), 0
    if batch.rows:
        send(ingest_pb2.LedgerReport(rows=batch))
    send(ingest_pb2.LedgerReport(end=ingest_pb2.LedgerRowsEnd()))


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # workers inherit that it is off
    bench = Bench.open()
    order = ingest_pb2.LedgerOrder.FromString(bench.order)
    shelf = Shelf(pathlib.Path(order.store))

    def send(report: Message) -> None:
        bench.send(report)

    with bench.refusing(lambda refusal: send(ingest_pb2.LedgerReport(refusal=refusal))):
        match order.WhichOneof("work"):
            case "build":
                build(shelf, order.build, send)
            case "measure":
                count(shelf, order.measure, send)
            case _:
                read(shelf, order.read, send)


if __name__ == "__main__":
    main()
