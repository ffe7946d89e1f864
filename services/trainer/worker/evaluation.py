"""The hold-out loss.

Law of this room: changes nothing that trains.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer.worker import checkpoint
from services.trainer.worker.aim import HELD_OUT
from services.trainer.worker.batches import pack, pad
from services.trainer.worker.facts import Teller
from services.trainer.worker.tensors import packed, padded


@torch.no_grad()
def evaluate(model, loss_of, held_out, step: int, spec, device: str, engine, teller: Teller) -> float | None:
    """Mean loss per trained token on the validation split, the same on every rank; None where no token is trained.

    Changes nothing that trains.
    """
    model.eval()
    count = min(len(held_out), spec.evaluation.max_rows or len(held_out))
    lay, cut = (packed, pack) if spec.data.packing else (padded, pad)
    lengths = held_out.lengths().tolist()
    loss, trained = 0.0, 0
    for numbers in cut(range(count), lengths, spec.data.micro_batch_tokens):
        if engine.world == 1:
            teller.stop_if_asked()
        loss += float(loss_of(loss_of.aim.shown(lay(held_out, numbers, device), held_out, numbers, HELD_OUT)))
        trained += loss_of.aim.trained(held_out, numbers, HELD_OUT)
    model.train()
    if not trained:
        return None
    value = engine.total(loss)[0] / engine.world / trained
    told = trainer_pb2.Evaluated(step=step, loss=value, rows=count, trained_tokens=trained)
    teller.tell(training_pb2.Fact(evaluated=told))
    return value


def judged(progress: checkpoint.Progress, loss: float | None, least: float) -> checkpoint.Progress:
    """Where a run is after it was evaluated; what was before training is not compared with."""
    progress = dataclasses.replace(progress, evaluated=progress.step, eval_loss=loss)
    if loss is None or not progress.step:
        return progress
    lowest = math.inf if progress.best_loss is None else progress.best_loss
    stale = 0 if loss < lowest - least else progress.stale + 1
    if not loss < lowest:
        return dataclasses.replace(progress, stale=stale)
    return dataclasses.replace(progress, stale=stale, best_loss=loss, best_step=progress.step)


def ends_early(progress: checkpoint.Progress, patience: int) -> bool:
    """Whether so many evaluations in a row did not improve; 0 = never."""
    return 0 < patience <= progress.stale
