"""What a step really takes: one forward and backward pass on the longest batch, before the first step.

Law of this room: changes nothing that trains: no weight, no random number, no gradient
that stays. A job that would not fit is refused here, with the numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from qlorad.v1 import trainer_pb2
from services.common import facts
from services.common.frames.v1 import training_pb2
from services.common.safetensors_header import read_model_headers
from services.trainer import admission, estimate
from services.trainer.activations import Run
from services.trainer.shape import shape_of
from services.trainer.worker import checkpoint
from services.trainer.worker.facts import Teller
from services.trainer.worker.tensors import packed, padded

_NEAR = 0.85
"""Of a budget, from where on nothing is kept between steps."""
_STATUS, _FORGET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def admit(
    model: Any, loss_of: Any, rows: Any, spec: trainer_pb2.TrainSpec, payload: pathlib.Path,
    known: facts.ModelFacts, device: str, teller: Teller,
) -> None:  # fmt: skip
    """Measures a full micro-batch and tells of it; chooses its size where the spec leaves it open.

    OverBudget where it takes more than memory.budget_bytes.
    """
    _give_back()  # loading leaves some
    lengths, data, budget = rows.lengths().tolist(), spec.data, spec.memory.budget_bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    run = estimate.run_of(spec, device)
    later = run.states * sum(4 * p.numel() for p in trained)  # the optimiser's state comes with its first step

    def measure(tokens: int) -> int:
        teller.stop_if_asked()
        numbers = fullest(lengths, tokens, data.packing)
        rng = checkpoint.get_rng(device)
        model.train()
        batch = (packed if data.packing else padded)(rows, numbers, "cpu")
        batch = loss_of.aim.shown(batch, rows, numbers, 0)

        def twice() -> None:  # what is freed in between is not always there for the next
            for _ in range(1 if data.micro_batch_tokens else 2):
                loss_of({n: t.to(device) for n, t in batch.items()}).backward()
                stay_within(budget, device)

        took = _peak(device, twice)
        for p in trained:
            p.grad = None
        checkpoint.set_rng(rng)
        return took + later

    if data.micro_batch_tokens:
        found = admission.Found(data.micro_batch_tokens, measure(data.micro_batch_tokens))
    else:
        least, most = max(lengths), min(max(sum(lengths), max(lengths)), estimate.MOST_TOKENS)
        cost = [_predicted(payload, known, replace(run, tokens=n)) for n in (least, least + 1024)]
        found = admission.fill(measure, least, most, budget, (cost[1] - cost[0]) / 1024)
        data.micro_batch_tokens = max(found.tokens, max(lengths))
        teller.say(f"micro-batches of {found.tokens} tokens take {found.bytes} of {budget} bytes")
    told = trainer_pb2.Admitted(
        predicted_bytes=_predicted(payload, known, replace(run, tokens=data.micro_batch_tokens)),
        measured_bytes=found.bytes,
        budget_bytes=budget,
    )
    teller.tell(training_pb2.Fact(admitted=told))
    admission.check(found.bytes, budget, data.micro_batch_tokens)


def stay_within(budget: int, device: str) -> None:
    """Gives back what the C library keeps between tensors, where it nears a budget; it grows from step to step."""
    if budget and device == "cpu" and psutil.Process().memory_info().rss > _NEAR * budget:
        _give_back()


def _give_back() -> None:
    give = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if give is not None:
        give(0)


def _predicted(payload: pathlib.Path, known: facts.ModelFacts, run: Run) -> int:
    """What EstimateJob says of it; 0 where config.json lacks a size."""
    tensors = read_model_headers(payload)
    try:
        shape = shape_of(
            json.loads((payload / "config.json").read_text()),
            {name: tensor.shape for name, tensor in tensors.items()},
            known.target_modules,
            max(tensor.width for tensor in tensors.values()),
        )
    except ValueError:
        return 0
    return estimate.needed(shape, run)


def fullest(lengths: list[int], tokens: int, packing: bool) -> list[int]:
    """Rows, the longest first, that fill a micro-batch; taken again where there are too few."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    if not packing:
        return [order[n % len(order)] for n in range(max(1, tokens // lengths[order[0]]))]
    chosen, room = [], tokens
    while room >= lengths[order[-1]]:
        for row in order:
            if lengths[row] <= room:
                chosen.append(row)
                room -= lengths[row]
    return chosen or [order[-1]]


def _peak(device: str, work: Callable[[], None]) -> int:
    """The most memory that was held while some work was done."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        work()
        return psutil.Process().memory_info().rss
    with contextlib.suppress(PermissionError):  # then the peak may be that of loading: too much is told, not too little
        _FORGET.write_text("5")
    work()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
