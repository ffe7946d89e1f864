"""The hold-out loss.

Law of this room: changes nothing that trains.
"""

from __future__ import annotations

import torch

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer.worker.aim import HELD_OUT
from services.trainer.worker.batches import pack, pad
from services.trainer.worker.facts import Teller
from services.trainer.worker.tensors import packed, padded


@torch.no_grad()
def evaluate(model, loss_of, held_out, step: int, spec, device: str, engine, teller: Teller) -> None:
    """Mean loss per trained token on the validation split. Changes nothing that trains."""
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
    if trained:
        told = trainer_pb2.Evaluated(step=step, loss=loss / trained, rows=count, trained_tokens=trained)
        teller.tell(training_pb2.Fact(evaluated=told))
