"""Continuous batching: rows come and go at every step.

Law of this room: one step = one forward: a token for every row that has its prompt behind it, and as much of
the waiting prompts as `pace` allows: the shortest first unless others waited long, and every few steps the oldest.
So a long prompt never stalls the others, and a cancelled request is gone before the next token. A row begins only
where there is room for all that it can ever need.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from qlorad.v1 import inference_pb2
from services.common.errors import rejected
from services.common.frames.v1 import engine_pb2
from services.inference import wire
from services.inference.worker import flat, sampling
from services.inference.worker.forward import Forward
from services.inference.worker.lanes import Lanes, Place
from services.inference.worker.lora import Lora
from services.inference.worker.pace import Pace
from services.inference.worker.prefix import Prefixes
from services.inference.worker.rows import Answering, Scoring
from services.inference.worker.turns import Turns

Report = engine_pb2.EngineReport
Row = Answering | Scoring
_SHORT = 256
"""Tokens of a prompt that does not hold up others for long: reading it makes a row that gets tokens."""
_WAITED = 256
"""Tokens that a short prompt may have more than another for each second that it waited longer."""
_PATIENCE = 3
"""Steps that read others' prompts in a row before the oldest has its turn."""
_WORTH = 16
"""Tokens of a prompt that are worth a piece beside others."""


class Scheduler:
    """Rows of one model. Not thread-safe: the engine's loop owns it."""

    def __init__(
        self,
        forward: Forward,
        lora: Lora,
        lanes: Lanes,
        prefixes: Prefixes,
        max_rows: int,
        context_tokens: int,
        end_ids: frozenset[int],
        device: torch.device,
        reach: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`reach` is the context with which a token costs twice what it costs with none."""
        self._forward, self._lora, self._lanes, self._prefixes = forward, lora, lanes, prefixes
        self._max_rows, self._context, self._end_ids = max_rows, context_tokens, end_ids
        self._device, self._reach, self._clock = device, reach, clock
        self._turns: Turns[Row] = Turns()
        self._rows: list[Row] = []
        """Oldest first."""
        self._pace = Pace()
        self._passed_over = 0
        """Steps since the oldest prompt that waits was read."""
        self._gauges = engine_pb2.EngineGauges()

    @property
    def has_work(self) -> bool:
        return bool(self._rows or len(self._turns))

    def gauges(self) -> engine_pb2.EngineGauges:
        """How it is after the last step."""
        self._gauges.rows, self._gauges.waiting = len(self._rows), len(self._turns)
        self._gauges.cache_bytes, self._gauges.prefix_bytes = self._lanes.bytes_used, self._prefixes.bytes_held
        self._gauges.prefix_hit_tokens = self._prefixes.hit_tokens
        self._gauges.prefix_miss_tokens = self._prefixes.miss_tokens
        self._gauges.on_device[:] = sorted(self._lora.on_device)
        return self._gauges

    def uses(self, digest: str) -> bool:
        """Whether a request in flight or waiting has this adapter."""
        return any(row.adapter == digest for row in (*self._rows, *self._turns))

    def submit(self, row: Row) -> None:
        """Queues a request; REJECTED if it could never be given room."""
        needed = self._lanes.bytes_for(row.longest(self._context))
        if self._lanes.limit and needed > self._lanes.limit:
            told = f"would need {needed} bytes for keys and values; this engine has {self._lanes.limit}"
            raise rejected(row.adapter or "the base", f"{told}; accepted: a shorter prompt or fewer max_tokens")
        self._turns.put(row)

    def cancel(self, call: int) -> list[Report]:
        """Drops a request; its end, or nothing if it is not here (any more)."""
        for row in self._turns:
            if row.call == call:
                self._turns.take(row)
                return [_ended(row, inference_pb2.FINISH_REASON_UNSPECIFIED)]
        for row in self._rows:
            if row.call == call:
                self._retire(row)
                return [_ended(row, inference_pb2.FINISH_REASON_UNSPECIFIED)]
        return []

    def step(self) -> list[Report]:
        """Admits, then one forward for all rows."""
        reports = self._admit()
        if not self._rows:
            return reports
        begun = self._clock()
        planned = self._planned()
        pieces = [piece for _, piece in planned]
        laid = flat.lay(pieces, self._device)
        self._lora.choose(laid, (row.adapter for row in self._rows))
        logits = self._forward(laid)
        flat.settle(pieces)
        reports += self._taken(planned, laid, logits)
        self._lora.choose(None)
        self._note(self._clock() - begun, planned)
        return reports

    def _note(self, seconds: float, planned: list[tuple[Row, flat.Piece]]) -> None:
        pieces = [piece for _, piece in planned if len(piece.ids) > 1]
        read, rows = sum(len(piece.ids) for piece in pieces), len(planned) - len(pieces)
        self._pace.note(seconds, sum(len(piece.ids) * self._cost(piece.place) for piece in pieces), rows)
        self._gauges.step_seconds, self._gauges.step_tokens = seconds, read + rows
        for row, piece in planned:
            self._turns.charge(row.share, len(piece.ids))
        if not self._turns:
            self._turns.forget({row.share for row in self._rows})

    # admitting and retiring

    def _admit(self) -> list[Report]:
        reports = []
        while len(self._rows) < self._max_rows and (row := self._turns.next()) is not None:
            place = self._lanes.take(row.longest(self._context))
            if place is None:
                break
            self._turns.take(row)
            row.given = place
            self._rows.append(row)
            cached = 0 if isinstance(row, Scoring) else self._prefixes.find(row.adapter, row.prompt, place)
            row.is_short = row.unread <= _SHORT
            begun = engine_pb2.EngineBegun(waited_seconds=self._clock() - row.arrived, cached_tokens=cached)
            reports.append(Report(call=row.call, begun=begun))
        return reports

    def _retire(self, row: Row) -> None:
        if isinstance(row, Answering) and row.made:
            self._prefixes.keep(row.adapter, [*row.prompt, *row.made], row.place)
        self._rows.remove(row)
        if row.unread:
            self._lanes.scrub(row.place)  # nobody has seen whether what it left is a number
        self._lanes.give(row.place)

    # a step

    def _planned(self) -> list[tuple[Row, flat.Piece]]:
        """Every row's next tokens; rows whose prompt has no turn in this step are left out."""
        going = [row for row in self._rows if not row.unread]
        reading = [row for row in self._rows if row.unread]
        planned = [(row, row.piece(1)) for row in going]
        given: dict[int, int] = {}
        if reading:
            budget = self._budget(len(going), 0)
            of_short = max(budget, self._budget(len(going), sum(row.is_short for row in reading)))
            oldest = reading[0]
            spent = 0.0
            for row in [*([oldest] if self._passed_over >= _PATIENCE else []), *sorted(reading, key=_burden)]:
                cost = self._cost(row.place)
                left = (of_short if row.is_short else budget) - spent
                more = min(max(int(left / cost), 0 if given else 1), row.unread - given.get(id(row), 0))
                if more >= min(_WORTH, row.unread) or (more > 0 and not given):
                    given[id(row)] = given.get(id(row), 0) + more
                    spent += more * cost
            self._passed_over = 0 if id(oldest) in given else self._passed_over + 1
        return planned + [(row, row.piece(given[id(row)])) for row in reading if id(row) in given]

    def _cost(self, place: Place) -> float:
        """What a token costs that looks back upon so many, by what one costs that looks back upon none."""
        return 1.0 + place.length / self._reach

    def _budget(self, going: int, short: int) -> int:
        """Tokens of prompts for this step, so that the whole is a usual number."""
        return max(flat.fitting(going + self._pace.tokens(going, short)) - going, 1)

    def _taken(self, planned: list[tuple[Row, flat.Piece]], laid: flat.Flat, logits: torch.Tensor) -> list[Report]:
        """Gives every row its logits, tells what came of it, and retires those that are done."""
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        where: dict[int, list[int]] = {}
        for at, number in enumerate(laid.order):
            where.setdefault(number, []).append(at)
        reports: list[Report] = []
        answering: list[tuple[Answering, int]] = []
        for number, (row, piece) in enumerate(planned):
            mine = where.get(number, [])
            if not all(sound[at] for at in mine):
                reports.append(self._unsound(row))
            elif isinstance(row, Scoring):
                reports += self._scored(row, logits[mine])
            else:
                if len(piece.ids) > 1 or not row.made:
                    # Piece by piece: all of a long prompt at once would hold up the others.
                    self._prefixes.keep(row.adapter, row.prompt, row.place)
                if mine:
                    answering.append((row, mine[0]))
        if answering:
            rows = logits if len(answering) == len(logits) else logits[[at for _, at in answering]]
            if rows is logits:
                answering.sort(key=lambda pair: pair[1])
            tokens = sampling.choose(rows, [row.chooser for row, _ in answering])
            for n, ((row, _), token) in enumerate(zip(answering, tokens, strict=True)):
                reports += self._settled(row, token, rows[n])
        return reports

    def _settled(self, row: Answering, token: int, logits: torch.Tensor) -> list[Report]:
        tokens = engine_pb2.EngineTokens(ids=[token])
        if row.options.HasField("log_probabilities"):
            count = row.options.log_probabilities
            tokens.log_probabilities.extend(sampling.told(logits[None], [token], count, row.spell))
        tokens.text, reason = row.settle(token, self._end_ids, self._context)
        reports = [Report(call=row.call, tokens=tokens)]
        if reason:
            self._retire(row)
            reports.append(_ended(row, reason))
        return reports

    def _scored(self, row: Scoring, logits: torch.Tensor) -> list[Report]:
        row.take(logits)
        if row.unread:
            return []
        self._retire(row)
        return [row.report()]

    def _unsound(self, row: Row) -> Report:
        """Its keys and values may not be finite either; nobody must inherit them."""
        self._prefixes.drop(row.adapter, row.prompt)
        self._lanes.scrub(row.place)
        row.place.length = 0
        self._retire(row)
        fault = rejected(row.adapter or "the base", "gave logits that are not finite")
        return Report(call=row.call, refusal=wire.pack(fault))


def _burden(row: Row) -> tuple[bool, float]:
    """Whose prompt is read first: the shortest; but among short ones waiting counts too."""
    return not row.is_short, row.unread + (_WAITED * row.arrived if row.is_short else 0.0)


def _ended(row: Row, reason: inference_pb2.FinishReason.ValueType) -> Report:
    return Report(call=row.call, ended=engine_pb2.EngineEnded(reason=reason))
