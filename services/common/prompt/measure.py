"""A dataset in tokens of one model, without a ledger: how long rows are, and what each limit would do.

Law of this room: what is counted is what a ledger would hold, by the same code.
Memory holds four bytes a row. A row that cannot be used is counted by its rule.
"""

from __future__ import annotations

import array
import collections
import contextlib
import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qlorad.v1 import datasets_pb2
from services.common import packing
from services.common.prompt import rows
from services.common.prompt.render import Renderer
from services.common.prompt.stream import batches
from services.common.prompt.tokens import Tokenizer
from services.common.prompt.writing import Progress
from services.common.shards import ShardReader, splits_in

SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)
_SHORTEST = 128


def usual_lengths(context_tokens: int) -> list[int]:
    """Powers of two from 128 up to a context; the context alone where it is shorter."""
    found = []
    length = _SHORTEST
    while length <= context_tokens:
        found.append(length)
        length *= 2
    return found or [context_tokens]


def measure(
    dataset: pathlib.Path, renderer: Renderer, tokenizer: Tokenizer, max_lengths: Sequence[int], progress: Progress
) -> datasets_pb2.DatasetMeasure:
    """Counts every split together. Leaves the digests to the caller."""
    readers = [ShardReader(dataset, split) for split in splits_in(dataset)]
    total, done = sum(map(len, readers)), 0
    limits = sorted(set(max_lengths))
    lengths = array.array("I")
    trained = 0
    cut_trained = dict.fromkeys(limits, 0)
    unusable: collections.Counter[str] = collections.Counter()
    for reader in readers:
        with contextlib.closing(batches(reader, renderer, tokenizer)) as found:
            for batch in found:
                for source in batch:
                    whole = source.whole
                    if isinstance(whole, rows.RowError):
                        unusable[whole.rule] += 1
                        continue
                    lengths.append(len(whole.ids))
                    trained += whole.trained_tokens
                    for limit in limits:
                        if limit >= len(whole.ids):
                            break
                        cut_trained[limit] += whole.trained_beyond(limit)
                done += len(batch)
                progress("measure", done, total)
    values = np.sort(np.frombuffer(lengths, np.uint32)) if lengths else np.zeros(0, np.uint32)
    made = datasets_pb2.DatasetMeasure(rows=len(values), tokens=int(values.sum(dtype=np.int64)), trained_tokens=trained)
    made.unusable_rows.update(unusable)
    if len(values):
        made.row_tokens.CopyFrom(_histogram(values))
        for share in SHARES:
            at = max(0, int(np.ceil(share * len(values))) - 1)
            made.quantiles.add(share=share, tokens=int(values[at]))
    for limit in limits:
        made.forecasts.append(_forecast(values, limit, cut_trained[limit]))
    return made


def _forecast(values: npt.NDArray[np.uint32], limit: int, cut_trained: int) -> datasets_pb2.LengthForecast:
    kept = np.minimum(values, limit)
    different, many = np.unique(kept, return_counts=True)
    sequences = packing.forecast(dict(zip(different.tolist(), many.tolist(), strict=True)), limit)
    tokens = int(kept.sum(dtype=np.int64))
    return datasets_pb2.LengthForecast(
        max_length_tokens=limit,
        longer_rows=int((values > limit).sum()),
        cut_tokens=int(values.sum(dtype=np.int64)) - tokens,
        cut_trained_tokens=cut_trained,
        packed_sequences=sequences,
        packing_fill=packing.fill(tokens, sequences, limit),
    )


def _histogram(values: npt.NDArray[np.uint32]) -> datasets_pb2.Histogram:
    """Bounds at powers of two and half-way between them, from 16 up to the longest row."""
    bounds: list[int] = []
    power = 16
    while not bounds or bounds[-1] < values[-1]:
        bounds += [power, power + power // 2]
        power *= 2
    places = np.searchsorted(np.array(bounds, np.int64), values, side="left")
    return datasets_pb2.Histogram(bounds=bounds, counts=np.bincount(places, minlength=len(bounds) + 1).tolist())
