"""A split as whole rows, a batch at a time: read, rendered and encoded.

Law of this room: memory does not grow with rows. While one batch is encoded (the
tokenizer's own threads, without Python's lock) the next is rendered.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from services.common.errors import corrupt
from services.common.prompt import rows
from services.common.prompt.body import Place, read
from services.common.prompt.example import ExampleError
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Encoded, Spelled, Tokenizer
from services.common.shards import ShardReader

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """One source row."""

    row: int
    """Its number in the split."""
    place: Place
    whole: rows.Whole | rows.RowError


_Drafted = tuple[int, Place, rows.Draft | rows.RowError]


def batches(reader: ShardReader, renderer: Renderer, tokenizer: Tokenizer) -> Generator[list[Found]]:
    """Every row of a split in order; DATA_LOSS where a line is no example."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        waiting: tuple[list[_Drafted], concurrent.futures.Future[Sequence[Encoded | Spelled]]] | None = None
        for drafted in _drafted(reader, renderer, tokenizer):
            texts = [d.text for _, _, d in drafted if isinstance(d, rows.Draft)]
            encoding = pool.submit(tokenizer.encode_many, texts)
            if waiting is not None:
                yield _finish(waiting[0], waiting[1].result(), tokenizer)
            waiting = drafted, encoding
        if waiting is not None:
            yield _finish(waiting[0], waiting[1].result(), tokenizer)


def _drafted(reader: ShardReader, renderer: Renderer, tokenizer: Tokenizer) -> Iterator[list[_Drafted]]:
    batch: list[_Drafted] = []
    characters = 0
    for number, line in enumerate(reader):
        place, draft = _draft(line, renderer, tokenizer)
        batch.append((number, place, draft))
        if isinstance(draft, rows.Draft):
            characters += len(draft.text)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _draft(line: bytes, renderer: Renderer, tokenizer: Tokenizer) -> tuple[Place, rows.Draft | rows.RowError]:
    try:
        place, body = read(line, renderer.sees_parts)
    except ExampleError as e:
        raise corrupt("dataset", str(e)) from None
    if isinstance(body, ExampleError):
        return place, rows.bad(body)
    try:
        return place, rows.draft_row(body, renderer, tokenizer)
    except rows.RowError as e:
        return place, e


def _finish(drafted: list[_Drafted], encoded: Sequence[Encoded | Spelled], tokenizer: Tokenizer) -> list[Found]:
    left = iter(encoded)
    found = []
    for number, place, draft in drafted:
        whole: rows.Whole | rows.RowError
        if isinstance(draft, rows.RowError):
            whole = draft
        else:
            try:
                whole = rows.whole_row(draft, next(left), tokenizer)
            except rows.RowError as e:
                whole = e
        found.append(Found(number, place, whole))
    return found
