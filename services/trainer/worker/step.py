"""One step: the gradient over its micro-batches, the optimiser, and what is told of it.

Law of this room: what went in is counted from the tensors that the model was
given, so that an epoch can be held against the ledger.
"""

from __future__ import annotations

import dataclasses

import psutil
import torch

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.common.prompt import tally
from services.trainer.worker import checkpoint
from services.trainer.worker.batches import Step, rate
from services.trainer.worker.facts import Teller
from services.trainer.worker.tensors import fed, packed, padded

SMOOTH = 0.9


class NotFinite(Exception):
    """A loss or a gradient that is no number."""


class BadData(Exception):
    """Rows that cannot be trained on."""


class NotTheLedger(Exception):
    """An epoch consumed something else than the ledger says."""


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What one step did."""

    loss: float
    grad_norm: float
    parameter_norm: float
    learning_rate: float
    tokens: int
    trained: int
    """Tokens that carried loss."""
    marked: int
    """Tokens that the ledger marks as trained (plain text: also a first token, which cannot carry loss)."""
    rows: int
    """The number of the rows that went in: see tally.py."""


def one_step(engine, loss_of, rows, step: Step, total: int, spec, device: str, teller: Teller) -> Done:
    """Gradient over the step's micro-batches, then the optimiser."""
    trained = sum(int(rows.mask(r)[1:].sum()) for batch in step.micro_batches for r in batch)
    if not trained:
        raise BadData(f"no token of step {step.number} carries loss (rows {sorted(sum(step.micro_batches, ()))[:8]})")
    lay = packed if spec.data.packing else padded
    sums, number = [0.0, 0.0, 0.0], 0
    for numbers, weight in engine.mine(step.micro_batches):
        if engine.world == 1:
            teller.stop_if_asked()
        batch = lay(rows, numbers, "cpu")
        loss = loss_of({name: t.to(device) for name, t in batch.items()}) * weight
        engine.backward(loss, trained)
        if weight:
            number = tally.plus(number, fed(batch))
            sums[0] += float(loss.detach())
            sums[1] += sum(len(rows.ids(n)) for n in numbers)
            sums[2] += sum(int(rows.mask(n).sum()) for n in numbers)
    value, tokens, marked, *pieces = engine.total(*sums, *tally.pieces(number))
    value /= trained
    if not value - value == 0.0:
        raise NotFinite(f"the loss of step {step.number} is {value}")
    s = spec.schedule
    kind = trainer_pb2.ScheduleKind.Name(s.kind).removeprefix("SCHEDULE_KIND_")
    learning_rate = rate(step.number, total, kind, s.warmup_steps, spec.optimizer.learning_rate)
    norm = engine.step(learning_rate)
    if not norm - norm == 0.0:
        raise NotFinite(f"the gradient's norm of step {step.number} is {norm}")
    size = engine.parameter_norm()
    return Done(value, norm, size, learning_rate, int(tokens), trained, int(marked), tally.joined(pieces))


def after_step(before: checkpoint.Progress, step: Step, done: Done) -> checkpoint.Progress:
    """Where the run is after one more step."""
    fresh = step.index == 0
    rows = before.epoch_rows
    if (
        fresh or rows
    ):  # a checkpoint of before this was counted does not tell; then it is not known until the next epoch
        rows = tally.text_of(tally.plus(done.rows, 0 if fresh else tally.number_of(rows)))
    return checkpoint.Progress(
        job=before.job,
        step=step.number,
        loss_average=SMOOTH * before.loss_average + (1 - SMOOTH) * done.loss,
        epoch_tokens=done.tokens + (0 if fresh else before.epoch_tokens),
        epoch_trained=done.marked + (0 if fresh else before.epoch_trained),
        epoch_rows=rows,
    )


def check_epoch(epoch: int, progress: checkpoint.Progress, counts, rows_number: str) -> str:
    """What was consumed in a whole epoch is what the ledger says: NotTheLedger, or a line that tells it."""
    consumed = (progress.epoch_tokens, progress.epoch_trained)
    if consumed != (counts.tokens, counts.trained_tokens):
        raise NotTheLedger(
            f"epoch {epoch + 1} consumed {consumed[0]} tokens ({consumed[1]} trained), "
            f"the ledger has {counts.tokens} ({counts.trained_tokens} trained)"
        )
    if progress.epoch_rows and progress.epoch_rows != rows_number:
        raise NotTheLedger(
            f"epoch {epoch + 1} consumed rows whose number is {progress.epoch_rows}, the ledger's rows have "
            f"{rows_number}: some row differs in its tokens or its mask"
        )
    return (
        f"epoch {epoch + 1} consumed what the ledger says: {counts.rows} rows, {consumed[0]} tokens, "
        f"{consumed[1]} trained, rows number {progress.epoch_rows or 'not told'}"
    )


def tell_step(
    teller: Teller,
    step: Step,
    total: int,
    done: Done,
    progress: checkpoint.Progress,
    taken: float,
    mean: float,
    device: str,
) -> None:
    """The facts about a step."""
    metrics = trainer_pb2.StepMetrics(
        step=step.number,
        total_steps=total,
        epoch=step.epoch + (step.index + 1) / step.of,
        loss=done.loss,
        loss_smoothed=progress.loss_average / (1 - SMOOTH**step.number),
        grad_norm=done.grad_norm,
        learning_rate=done.learning_rate,
        tokens=done.tokens,
        trained_tokens=done.trained,
        tokens_per_second=done.tokens / max(taken, 1e-9),
        step_seconds=taken,
        host_memory_bytes=psutil.Process().memory_info().rss,
        device_memory_bytes=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0,
        eta_seconds=mean * (total - step.number),
        parameter_norm=done.parameter_norm,
    )
    teller.tell(training_pb2.Fact(step=metrics))
