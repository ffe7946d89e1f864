"""Continuous batching: rows come and go at every step.

Law of this room: one step = at most one piece of one prompt, then one token for
every row that has its prompt behind it; so a long prompt never stalls the
others, and a cancelled request is gone before the next token. Rows lie in the
cache's slots without a gap; the one row that still reads its prompt lies last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qlorad.v1 import inference_pb2
from services.common.errors import rejected
from services.common.frames.v1 import engine_pb2
from services.inference import wire
from services.inference.text import Detokeniser, StopFilter
from services.inference.worker.cache import SlotCache
from services.inference.worker.lora import Lora
from services.inference.worker.sampling import Chooser, choose

_PIECE = 256  # tokens of a prompt read in one step
_CONTEXT_OF_TEXT = 8  # tokens of the prompt that the detokeniser sees

Report = engine_pb2.EngineReport


@dataclass(slots=True)
class Row:
    """One request in the engine."""

    call: int
    adapter: str
    prompt: list[int]
    options: inference_pb2.GenerationOptions
    text: Detokeniser
    stops: StopFilter
    chooser: Chooser
    arrived: float = field(default_factory=time.monotonic)
    length: int = 0
    """Tokens in the cache: those of the prompt that were read, then all made but the newest."""
    made: list[int] = field(default_factory=list)


def make_row(
    call: int,
    submit: engine_pb2.EngineSubmit,
    prompt: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    end: str = "",
) -> Row:
    """A fresh row for a request whose prompt fits; `end` is text that ends an answer as its stop strings do."""
    options = submit.options
    return Row(
        call,
        submit.adapter_digest,
        list(prompt),
        options,
        Detokeniser(decode, tuple(prompt[-_CONTEXT_OF_TEXT:])),
        StopFilter((*options.stop, end) if end else tuple(options.stop)),
        Chooser(options),
    )


class Scheduler:
    """Rows of one model. Not thread-safe: the engine's loop owns it."""

    def __init__(self, model, lora: Lora, max_rows: int, context_tokens: int, end_ids: frozenset[int]) -> None:
        self._model = model
        self._lora = lora
        self._max_rows = max_rows
        self._context = context_tokens
        self._end_ids = end_ids
        self._device = model.get_input_embeddings().weight.device
        self._cache = SlotCache(max_rows, context_tokens, self._device)
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        """In the order of their slots; those that decode first, the one that reads last."""

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._waiting)

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes_held

    def uses(self, digest: str) -> bool:
        """Whether a request in flight or waiting has this adapter."""
        return any(row.adapter == digest for row in (*self._rows, *self._waiting))

    def submit(self, row: Row) -> None:
        """Queues a request."""
        self._waiting.append(row)

    def cancel(self, call: int) -> list[Report]:
        """Drops a request; its end, or nothing if it is not here (any more)."""
        for row in self._waiting:
            if row.call == call:
                self._waiting.remove(row)
                return [_ended(row, inference_pb2.FINISH_REASON_UNSPECIFIED)]
        for slot, row in enumerate(self._rows):
            if row.call == call:
                self._retire(slot)
                return [_ended(row, inference_pb2.FINISH_REASON_UNSPECIFIED)]
        return []

    def step(self) -> list[Report]:
        """Admits, reads one piece of a prompt, makes one token for every other row."""
        reports = self._admit()
        reading = self._reading()
        if reading is not None:
            reports += self._read(reading)
        decoding = [row for row in self._rows if row is not reading]
        if decoding:
            reports += self._decode(decoding)
        if not self._rows:
            self._lora.choose(())
            self._cache.clear()
        return reports

    # admitting and retiring

    def _reading(self) -> Row | None:
        last = self._rows[-1] if self._rows else None
        return last if last is not None and not last.made else None

    def _admit(self) -> list[Report]:
        if not self._waiting or len(self._rows) >= self._max_rows or self._reading() is not None:
            return []
        row = self._waiting.popleft()
        self._rows.append(row)
        waited = time.monotonic() - row.arrived
        return [Report(call=row.call, begun=engine_pb2.EngineBegun(waited_seconds=waited))]

    def _retire(self, slot: int) -> None:
        """Takes a row out and closes the gap without unsettling the reading row's place."""
        reading = self._reading()
        last = len(self._rows) - 1
        last_decoding = last - 1 if reading is not None and self._rows[slot] is not reading else last
        if slot != last_decoding:
            self._move(last_decoding, slot)
        if last_decoding != last:
            self._move(last, last_decoding)
        self._rows.pop()

    def _move(self, source: int, target: int) -> None:
        self._cache.move(source, target, self._rows[source].length)
        self._rows[target] = self._rows[source]

    # forwards

    def _forward(self, first: int, rows: list[Row], tokens: list[list[int]]) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of each row's new tokens."""
        positions, mask = self._cache.open(first, [row.length for row in rows], len(tokens[0]))
        self._lora.choose([row.adapter for row in rows])
        out = self._model(
            input_ids=torch.tensor(tokens, dtype=torch.long, device=self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for row in rows:
            row.length += len(tokens[0])
        return out.logits[:, -1].float()

    def _read(self, row: Row) -> list[Report]:
        piece = row.prompt[row.length : row.length + _PIECE]
        logits = self._forward(len(self._rows) - 1, [row], [piece])
        return self._take([row], logits) if row.length == len(row.prompt) else []

    def _decode(self, rows: list[Row]) -> list[Report]:
        return self._take(rows, self._forward(0, rows, [[row.made[-1]] for row in rows]))

    def _take(self, rows: list[Row], logits: torch.Tensor) -> list[Report]:
        """Chooses a token for each row, tells of it, and retires the rows that are done."""
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        tokens = choose(torch.nan_to_num(logits), [row.chooser for row in rows])
        reports: list[Report] = []
        for row, token, is_sound in zip(rows, tokens, sound, strict=True):
            if is_sound:
                reports += self._settle(row, token)
                continue
            # Its keys and values may not be finite either; nobody must inherit them.
            self._cache.scrub(self._rows.index(row))
            self._retire(self._rows.index(row))
            fault = rejected(row.adapter or "the base", "gave logits that are not finite")
            reports.append(Report(call=row.call, refusal=wire.pack(fault)))
        return reports

    def _settle(self, row: Row, token: int) -> list[Report]:
        row.made.append(token)
        reason = inference_pb2.FINISH_REASON_UNSPECIFIED
        if token in self._end_ids:
            piece, stopped = "", False
            reason = inference_pb2.FINISH_REASON_END
        else:
            piece, stopped = row.stops.push(row.text.push(token))
        if stopped:
            reason = inference_pb2.FINISH_REASON_STOP
        elif not reason and (
            len(row.made) >= row.options.max_tokens or len(row.prompt) + len(row.made) >= self._context
        ):
            reason = inference_pb2.FINISH_REASON_LENGTH
        if reason and not stopped:
            rest, stopped = row.stops.push(row.text.flush())
            piece += rest
            if stopped:
                reason = inference_pb2.FINISH_REASON_STOP
            else:
                piece += row.stops.flush()
        reports = [Report(call=row.call, tokens=engine_pb2.EngineTokens(ids=[token], text=piece))]
        if reason:
            self._retire(self._rows.index(row))
            reports.append(_ended(row, reason))
        return reports


def _ended(row: Row, reason: inference_pb2.FinishReason.ValueType) -> Report:
    return Report(call=row.call, ended=engine_pb2.EngineEnded(reason=reason))
