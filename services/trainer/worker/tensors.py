"""Rows of the ledger as the tensors that a model is given, and read back from them.

Law of this room: no row sees another; what is read back is compared with the
ledger after each epoch, so nothing between here and the ledger can go unseen.
"""

from __future__ import annotations

import itertools

import torch

from services.common.prompt import tally


def packed(rows, numbers, device: str) -> dict[str, torch.Tensor]:
    """Rows one after another in one sequence. No 2-D mask: positions that begin anew keep samples apart."""
    ids, labels, positions = [], [], []
    for number in numbers:
        row, mask = (
            torch.from_numpy(rows.ids(number).astype("int64")),
            torch.from_numpy(rows.mask(number).astype("bool")),
        )
        label = row.masked_fill(~mask, -100)
        label[0] = -100  # else the last token of the sample before would be trained to give it
        ids.append(row)
        labels.append(label)
        positions.append(torch.arange(len(row)))
    joined = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.cat(parts)[None].to(device) for name, parts in joined.items()}


def padded(rows, numbers, device: str) -> dict[str, torch.Tensor]:
    """Rows under one another, filled up at the right."""
    widest = max(len(rows.ids(n)) for n in numbers)
    ids = torch.zeros(len(numbers), widest, dtype=torch.int64)
    labels = torch.full((len(numbers), widest), -100)
    there = torch.zeros(len(numbers), widest, dtype=torch.int64)
    for line, number in enumerate(numbers):
        row, mask = (
            torch.from_numpy(rows.ids(number).astype("int64")),
            torch.from_numpy(rows.mask(number).astype("bool")),
        )
        ids[line, : len(row)] = row
        labels[line, : len(row)] = row.masked_fill(~mask, -100)
        there[line, : len(row)] = 1
    labels[:, 0] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": there.to(device)}


def fed(batch: dict[str, torch.Tensor]) -> int:
    """The number of the rows inside a batch, as tally.py counts them; read from what the model is given, on the CPU."""
    ids, marked = batch["input_ids"], batch["labels"] == batch["input_ids"]
    if "position_ids" in batch:
        begins = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        parts = [(ids[0, a:b], marked[0, a:b]) for a, b in itertools.pairwise(begins)]
    else:
        widths = batch["attention_mask"].sum(1).tolist()
        parts = [(ids[line, :width], marked[line, :width]) for line, width in enumerate(widths)]
    number = 0
    for row, mask in parts:
        one = tally.row_number(row.numpy().astype("uint32"), mask.numpy().astype("uint8").tobytes())
        number = tally.plus(number, one)
    return number
