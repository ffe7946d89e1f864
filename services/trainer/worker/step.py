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
from services.trainer import guards
from services.trainer.worker import checkpoint
from services.trainer.worker.batches import Step
from services.trainer.worker.facts import Teller
from services.trainer.worker.schedule import course_of
from services.trainer.worker.tensors import fed, packed, padded


class BadData(Exception):
    """Rows that cannot be trained on."""


class NotTheLedger(Exception):
    """An epoch consumed something else than the ledger says."""


class Troubled(Exception):
    """A step that the job's guards do not let pass."""


class NotFinite(Troubled):
    """A loss or a gradient that is no number."""


class Spike(Troubled):
    """A loss far above what it was."""


class AllMasked(Troubled):
    """A step none of whose tokens carries loss."""


_STOPS = {"NOT_FINITE": NotFinite, "SPIKE": Spike, "ALL_MASKED": AllMasked}


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
    skipped: bool = False
    """Whether its gradient was thrown away."""
    overflowed: bool = False
    """Whether that was because fp16 ran over, which its loss scale is there for."""
    loss_scale: float = 1.0


def one_step(
    engine, loss_of, rows, step: Step, total: int, spec, device: str, teller: Teller, progress: checkpoint.Progress
) -> Done:
    """Gradient over the step's micro-batches, then the optimiser; Troubled where a guard says stop.

    A step that is skipped leaves weights, optimiser and schedule as they were.
    """
    rules, scale = guards.rules_of(spec), guards.scale_of(spec, progress.loss_scale, progress.scale_steps).value
    aim = loss_of.aim
    trained = sum(aim.trained(rows, batch, step.epoch) for batch in step.micro_batches)
    lay = packed if spec.data.packing else padded
    sums, number = [0.0, 0.0, 0.0], 0
    for numbers, weight in engine.mine(step.micro_batches):
        if engine.world == 1:
            teller.stop_if_asked()
        batch = lay(rows, numbers, "cpu")
        if trained:
            shown = aim.shown(batch, rows, numbers, step.epoch)
            loss = loss_of({name: t.to(device) for name, t in shown.items()}) * weight
            engine.backward(loss * scale if scale != 1.0 else loss, trained)
            sums[0] += float(loss.detach()) if weight else 0.0
        if weight:
            number = tally.plus(number, fed(batch))
            sums[1] += sum(len(rows.ids(n)) for n in numbers)
            sums[2] += sum(int(rows.mask(n).sum()) for n in numbers)
    value, tokens, marked, *pieces = engine.total(*sums, *tally.pieces(number))
    value = value / trained if trained else 0.0
    learning_rate = course_of(spec).rate(step.number - progress.skipped, total)
    norm, overflowed = 0.0, False
    if trained:
        trouble = guards.of_loss(step.number, value, usual_of(progress), rules)
    else:
        trouble = guards.of_mask(step.number, sorted(sum(step.micro_batches, ())), rules)
    if trouble is not None:
        _told(trouble, progress, rules, teller)
    skipped = trouble is not None and trouble.done == guards.SKIP
    if skipped:
        engine.forget()
    else:
        norm = engine.step(learning_rate, scale)
        wrong = guards.of_gradient(step.number, norm, rules)
        skipped, overflowed = wrong is not None, wrong is not None and scale > 1.0
        if wrong is not None and not overflowed:
            _told(wrong, progress, rules, teller)
    return Done(
        value, norm, engine.parameter_norm(), learning_rate, int(tokens), trained, int(marked), tally.joined(pieces),
        skipped=skipped, overflowed=overflowed, loss_scale=scale,
    )  # fmt: skip


def _told(trouble: trainer_pb2.Trouble, progress: checkpoint.Progress, rules: guards.Rules, teller: Teller) -> None:
    """Tells of trouble; raises where it ends the job."""
    skips = progress.skips + 1
    if trouble.done == guards.SKIP and skips >= rules.max_skips:
        trouble.done = guards.STOP
        trouble.message += f"; {skips} steps in a row were to be skipped (guards.max_skips {rules.max_skips})"
    teller.tell(training_pb2.Fact(trouble=trouble))
    if trouble.done == guards.STOP:
        raise _STOPS[trouble.kind](trouble.message)


def usual_of(progress: checkpoint.Progress) -> guards.Usual:
    """What losses have been; a checkpoint of before this was counted skipped no step."""
    counted = progress.step if progress.loss_steps < 0 else progress.loss_steps
    return guards.Usual(progress.loss_average, progress.loss_distance, counted)


def after_step(before: checkpoint.Progress, step: Step, done: Done) -> checkpoint.Progress:
    """Where the run is after one more step."""
    fresh = step.index == 0
    rows = before.epoch_rows
    if (
        fresh or rows
    ):  # a checkpoint of before this was counted does not tell; then it is not known until the next epoch
        rows = tally.text_of(tally.plus(done.rows, 0 if fresh else tally.number_of(rows)))
    usual = usual_of(before) if done.skipped else usual_of(before).after(done.loss)
    scale = guards.Scale(done.loss_scale, before.scale_steps)
    if done.loss_scale != 1.0 and (done.overflowed or not done.skipped):
        scale = scale.after(done.overflowed)
    return dataclasses.replace(
        before,
        step=step.number,
        loss_average=usual.average,
        loss_distance=usual.distance,
        loss_steps=usual.steps,
        epoch_tokens=done.tokens + (0 if fresh else before.epoch_tokens),
        epoch_trained=done.marked + (0 if fresh else before.epoch_trained),
        epoch_rows=rows,
        skipped=before.skipped + done.skipped,
        skips=before.skips if done.overflowed else before.skips + 1 if done.skipped else 0,
        loss_scale=scale.value,
        scale_steps=scale.steps,
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
        loss_smoothed=usual_of(progress).smoothed,
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
        loss_scale=done.loss_scale,
        skipped=done.skipped,
    )
    teller.tell(training_pb2.Fact(step=metrics))
