"""A sealed dataset's rows as JSONL in a chosen form, in pieces, with a summary of what was lost.

Law of this room: what a form cannot carry is never silent: it ends the export,
or it is counted. Reads sealed lines alone, as plain data; blocking.
"""

from __future__ import annotations

import itertools
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence

import orjson

from qlorad.v1 import datasets_pb2
from services.common.errors import rejected
from services.common.shards import ShardReader
from services.datasets.forms import CANONICAL, NAMES, Form
from services.datasets.losses import CannotCarry, Losses
from services.datasets.writing import Plain, write

_PIECE_BYTES = 256 << 10


class Export:
    """One export; `pieces` gives its bytes, `summary` what became of the rows that went by."""

    def __init__(
        self,
        resource: str,
        payload: pathlib.Path,
        splits: Sequence[str],
        form: Form,
        on_loss: datasets_pb2.OnLoss.ValueType,
        max_rows: int,
    ) -> None:
        self._resource = resource
        self._payload = payload
        self._form = form or CANONICAL
        self._on_loss = on_loss or datasets_pb2.ON_LOSS_REFUSE
        self._left = max_rows
        self._is_bounded = max_rows > 0
        self._rows = self._skipped = 0
        self._lost: Counter[str] = Counter()
        self._lines = itertools.chain.from_iterable(self._split(name) for name in splits)

    @property
    def summary(self) -> datasets_pb2.ExportSummary:
        """Counts so far."""
        return datasets_pb2.ExportSummary(rows=self._rows, skipped_rows=self._skipped, lost_fields=self._lost)

    def piece(self) -> bytes:
        """Some more rows; empty at the end. REJECTED names the first row that may not be written."""
        made: list[bytes] = []
        size = 0
        for line in self._lines:
            made += (line, b"\n")
            size += len(line) + 1
            self._rows += 1
            if size >= _PIECE_BYTES or (self._is_bounded and self._rows >= self._left):
                break
        return b"".join(made)

    def _split(self, split: str) -> Iterator[bytes]:
        for number, line in enumerate(ShardReader(self._payload, split)):
            if self._is_bounded and self._rows >= self._left:
                return
            if self._form == CANONICAL:
                yield line
                continue
            made = self._row(orjson.loads(line), split, number)
            if made is None:
                self._skipped += 1
            else:
                yield made

    def _row(self, example: Plain, split: str, number: int) -> bytes | None:
        """The row as a line; None where it is to be left out."""
        try:
            row, losses = write(example, self._form)
        except CannotCarry as e:
            if self._on_loss == datasets_pb2.ON_LOSS_SKIP_ROW:
                return None
            raise self._rejected(example, split, number, e.field, e.why) from None
        if losses and not self._may_lose(example, losses, split, number):
            return None
        return orjson.dumps(row)

    def _may_lose(self, example: Plain, losses: Losses, split: str, number: int) -> bool:
        grave = losses.first_grave
        if grave is not None and self._on_loss == datasets_pb2.ON_LOSS_SKIP_ROW:
            return False
        if grave is not None and self._on_loss != datasets_pb2.ON_LOSS_DROP_FIELDS:
            raise self._rejected(example, split, number, grave.place, grave.why)
        self._lost.update({loss.field for loss in losses})
        return True

    def _rejected(self, example: Plain, split: str, number: int, field: str, why: str) -> Exception:
        origin = example.get("origin", {})
        place = f"{origin.get('file', '')}:{origin.get('line', 0)}"
        told = f"row {number} of {split} (from {place}), field {field}: {why}"
        return rejected(self._resource, f"{told}; the {NAMES[self._form]} form cannot carry it")
