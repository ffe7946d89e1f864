"""What a run learns: its objective, at work on batches.

Law of this room: what a plug-in gives is looked at before it is used; one that
fails is named. Which tokens carry loss is known before a batch is made.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from services.common import parameters
from services.common.errors import rejected
from services.common.prompt.render import TOKENIZER_CONFIG
from services.common.worker.plugins import Broken
from services.trainer.worker.objectives.built_in import Completion
from services.trainer.worker.objectives.kinds import objectives
from services.trainer.worker.objectives.masked import HELD_OUT, MaskedLm

__all__ = ["HELD_OUT", "Aim", "ObjectiveFailed", "aim_of"]


class ObjectiveFailed(Exception):
    """A plug-in's objective that broke, or gave something else than losses."""


class Aim:
    """An objective with what it needs to know of the model."""

    def __init__(
        self, objective: Any = None, name: str = "", seed: int = 0, mask_token: int = 0, vocabulary: int = 0
    ) -> None:
        objective = objective or Completion()
        self._objective, self._name = objective, name
        self._seed, self._mask_token, self._vocabulary = seed, mask_token, vocabulary
        self.predicts_itself = isinstance(objective, MaskedLm)
        """Whether a place's label is the token at that place, not the next one."""
        self.is_plain = type(objective) in (Completion, MaskedLm)
        """Whether a token's loss is minus its log-probability."""
        self.extras: Mapping[str, Any] = {} if self.predicts_itself else {"use_cache": False}
        """What a model of this objective is told beside a batch."""

    def trained(self, rows: Any, numbers: Sequence[int], epoch: int) -> int:
        """How many tokens of some rows carry loss."""
        if self.predicts_itself:
            return sum(len(self._objective.places(rows.mask(n), self._seed, epoch, n)) for n in numbers)
        return sum(int(rows.mask(n)[1:].sum()) for n in numbers)

    def shown(self, batch: dict[str, torch.Tensor], rows: Any, numbers: Sequence[int], epoch: int) -> Any:
        """The batch as the model is given it. A masked language model takes padded batches alone."""
        if not self.predicts_itself:
            return batch
        ids, labels = batch["input_ids"].clone(), torch.full_like(batch["labels"], -100)
        for line, number in enumerate(numbers):
            row = rows.ids(number).astype("int64")
            hidden = self._objective.hide(
                row, rows.mask(number), self._mask_token, self._vocabulary, self._seed, epoch, number
            )
            ids[line, : len(row)] = torch.from_numpy(hidden.ids).to(ids.device)
            places = torch.from_numpy(hidden.places).to(ids.device)
            labels[line, places] = torch.from_numpy(row[hidden.places]).to(ids.device)
        return {**batch, "input_ids": ids, "labels": labels}

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each token; ObjectiveFailed names what gave none."""
        try:
            found = self._objective.token_losses(logits, labels)
        except MemoryError:
            raise
        except Exception as e:
            if type(e).__name__ == "OutOfMemoryError":
                raise
            raise ObjectiveFailed(f"{self._name} failed with {type(e).__name__}: {e}") from e
        if not isinstance(found, torch.Tensor) or found.shape != labels.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ObjectiveFailed(f"{self._name} gave {shape} for {len(labels)} tokens; accepted: one loss a token")
        if torch.is_grad_enabled() and logits.requires_grad and not found.requires_grad:
            raise ObjectiveFailed(f"{self._name} gave losses that do not depend on the logits")
        return found


def aim_of(spec: Any, payload: pathlib.Path, vocabulary: int) -> Aim:
    """The objective of a spec; a Fault where it cannot be had."""
    wanted = spec.objective.name or "completion"
    try:
        kind = objectives().load(wanted)
    except Broken as e:
        raise rejected(f"the objective {wanted}", str(e)) from None
    if kind is None:
        raise rejected(f"the objective {wanted}", "is not installed any more")
    told, violations = parameters.values(kind.schema, spec.objective.parameters, "spec.train.objective.parameters")
    if violations:
        v = violations[0]
        raise rejected(f"the objective {wanted}", f"{v.field}: got {v.given}; accepted: {v.accepted}")
    try:
        objective = parameters.made(kind.type, told)
    except ValueError as e:
        raise rejected(f"the objective {wanted}", str(e)) from None
    mask_token = _mask_token(payload) if isinstance(objective, MaskedLm) else 0
    return Aim(objective, f"the objective {wanted} of {kind.package}", spec.seed, mask_token, vocabulary)


def _mask_token(payload: pathlib.Path) -> int:
    """The id of the model's mask token; REJECTED where it has none."""
    import tokenizers

    told = json.loads((payload / TOKENIZER_CONFIG).read_text()).get("mask_token")
    text = told.get("content") if isinstance(told, dict) else told
    if not isinstance(text, str):
        raise rejected("the model", "tokenizer_config.json names no mask_token, so nothing can be hidden")
    found = tokenizers.Tokenizer.from_file(str(payload / "tokenizer.json")).token_to_id(text)
    if found is None:
        raise rejected("the model", f"the mask token {text!r} is not in its tokenizer")
    return int(found)
