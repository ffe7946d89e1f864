"""Which objectives there are.

Law of this room: a list of names; how they are found and loaded is
services/common/worker/plugins.py.
"""

from __future__ import annotations

from services.common.worker.plugins import Kinds, Sort

_ROOM = "services.trainer.worker.objectives"
OBJECTIVES = Sort(
    group="qlorad.objectives",
    noun="objective",
    method="token_losses(logits, labels)",
    built_in={
        "completion": f"{_ROOM}.built_in:Completion",
        "label-smoothing": f"{_ROOM}.built_in:LabelSmoothing",
        "masked-lm": f"{_ROOM}.masked:MaskedLm",
    },
)


def objectives() -> Kinds:
    """The objectives of this installation."""
    return Kinds(OBJECTIVES)
