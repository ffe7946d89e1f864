"""One run over a dataset: its rows into columns, and what is wrong with them.

Law of this room: every source row is written, dropped and counted, or told of.
Memory does not grow with rows, but for the names of files.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlorad.v1 import datasets_pb2
from services.common import packing
from services.common.errors import Fault, Violation, invalid, rejected
from services.common.prompt import rows, tally
from services.common.prompt.body import Place
from services.common.prompt.columns import Array, ColumnWriter, PlaceWriter
from services.common.prompt.render import Renderer
from services.common.prompt.stream import Found, batches
from services.common.prompt.tokens import Tokenizer
from services.common.shards import ShardReader, splits_in

MAX_VIOLATIONS = 20
COLUMNS = ("ids", "mask", "cut", "text")
Progress = Callable[[str, int, int], None]
_MENDABLE = {
    rows.NOTHING_TRAINED: "a row with at least one trained token within the limit",
    rows.BAD_EXAMPLE: "a row that a chat template can be shown",
    rows.PREFERENCE: "chat, completion, text or infill rows",
}


@dataclass(frozen=True, slots=True)
class Made:
    """What a run wrote beside the columns."""

    splits: list[dict[str, Any]]
    """One qlorad.v1.LedgerSplit each."""
    files: list[str]
    """Names of files, by the numbers that places tell."""
    rows_numbers: dict[str, str]
    """For each split, one number of all its rows: see tally.py."""
    pieces: dict[str, str]
    """Every id that occurs, as text."""


class Seen:
    """Which ids occur."""

    def __init__(self, expected: int) -> None:
        self._flags = np.zeros(expected, np.bool_)

    def add(self, ids: Array) -> None:
        try:
            self._flags[ids] = True
        except IndexError:  # a vocabulary with gaps has ids above its size
            self._flags = np.concatenate([self._flags, np.zeros(int(ids.max()) + 1, np.bool_)])
            self._flags[ids] = True

    def ids(self) -> list[int]:
        """Rising."""
        found: list[int] = np.flatnonzero(self._flags).tolist()
        return found


class _Split:
    """One split as it is written."""

    def __init__(self, out: pathlib.Path, name: str, files: dict[str, int], seen: Seen) -> None:
        self.count = datasets_pb2.LedgerSplit(split=name)
        self.number = 0
        self.lengths: collections.Counter[int] = collections.Counter()
        self._seen = seen
        self._open = contextlib.ExitStack()
        self._columns = {n: self._open.enter_context(ColumnWriter(out, name, n)) for n in COLUMNS}
        self._places = self._open.enter_context(PlaceWriter(out, name, files))

    def close(self) -> None:
        self._open.close()

    def take(self, source: Found, made: tuple[rows.Row, ...], length: int) -> None:
        """Writes and counts what became of one source row."""
        count = self.count
        count.longest_tokens = max(count.longest_tokens, length)
        if made[0].dropped:
            count.dropped_rows += 1
            return
        for row in made:
            ids = np.array(row.ids, np.uint32)
            self._seen.add(ids)
            if row.cut_ids:
                self._seen.add(np.array(row.cut_ids, np.uint32))
            self.number = tally.plus(self.number, tally.row_number(ids, row.mask))
            self.lengths[len(ids)] += 1
            count.rows += 1
            count.tokens += len(ids)
            count.trained_tokens += row.trained_tokens
            count.cut_tokens += len(row.cut_ids)
            self._columns["ids"].add(ids)
            self._columns["mask"].add(row.mask)
            self._columns["cut"].add(row.cut_ids)
            self._columns["text"].add(row.text.encode())
            self._places.add(source.row, source.place.file, source.place.line, row.piece)


class Build:
    """One run over a dataset."""

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Tokenizer,
        max_length_tokens: int,
        policy: datasets_pb2.OverLength.ValueType,
        out: pathlib.Path,
    ) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._limit = max_length_tokens
        self._policy = policy
        self._out = out
        self._wrong: list[Violation] = []

    def run(self, dataset: pathlib.Path, progress: Progress) -> Made:
        """Writes every split; INVALID_ARGUMENT or REJECTED with what is wrong."""
        readers = {split: ShardReader(dataset, split) for split in splits_in(dataset)}
        total, done = sum(map(len, readers.values())), 0
        files: dict[str, int] = {}
        seen = Seen(self._tokenizer.vocabulary)
        splits, numbers = [], {}
        for name, reader in readers.items():
            split = _Split(self._out, name, files, seen)
            found = batches(reader, self._renderer, self._tokenizer)
            with contextlib.closing(split), contextlib.closing(found):
                for batch in found:
                    for source in batch:
                        self._take(split, source)
                    done += len(batch)
                    progress("render", done, total)
            count = split.count
            count.packed_sequences = packing.forecast(split.lengths, self._limit)
            count.packing_fill = packing.fill(count.tokens, count.packed_sequences, self._limit)
            splits.append({f.name: getattr(count, f.name) for f in count.DESCRIPTOR.fields})
            numbers[name] = tally.text_of(split.number)
        if self._wrong:
            raise _unusable(self._wrong, "")
        known = seen.ids()
        pieces = dict(zip(map(str, known), self._tokenizer.pieces(known), strict=True))
        return Made(splits, list(files), numbers, pieces)

    def _take(self, split: _Split, source: Found) -> None:
        whole = source.whole
        if isinstance(whole, rows.RowError):
            self._note(source.place, whole)
            return
        try:
            made = rows.finish_rows(whole, self._tokenizer, self._limit, self._policy)
        except rows.RowError as e:
            self._note(source.place, e)
            return
        length = len(whole.ids)
        split.take(source, made, length)
        if length > self._limit:
            split.count.truncated_rows += self._policy == datasets_pb2.OVER_LENGTH_TRUNCATE
            split.count.split_rows += self._policy == datasets_pb2.OVER_LENGTH_SPLIT

    def _note(self, place: Place, error: rows.RowError) -> None:
        """Keeps what a person can mend row by row; raises what the model cannot do, and when it is enough."""
        if error.rule == rows.OVER_LENGTH:
            accepted = f"at most {self._limit} tokens, or over_length TRUNCATE, DROP or SPLIT"
            self._wrong.append(Violation(str(place), f"{error.length_tokens} tokens", accepted))
        elif error.rule in _MENDABLE:
            self._wrong.append(Violation(str(place), str(error), _MENDABLE[error.rule]))
        else:
            raise rejected(str(place), str(error))
        if len(self._wrong) >= MAX_VIOLATIONS:
            raise _unusable(self._wrong, "at least ")


def _unusable(wrong: list[Violation], more: str) -> Fault:
    """INVALID_ARGUMENT with the rows that cannot be used, and how many they are."""
    fault = invalid(wrong)
    fault.message = f"{more}{len(wrong)} row{'s' if len(wrong) != 1 else ''} cannot be used: {fault.message}"
    return fault
