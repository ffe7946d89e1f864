"""The masked language model: some tokens are hidden, and are predicted from both sides.

Law of this room: which tokens of a row are hidden is a function of seed, epoch
and row, so a run that goes on hides the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.trainer.worker.objectives.api import parameter
from services.trainer.worker.objectives.built_in import Completion

HELD_OUT = (1 << 32) - 1
"""In the place of an epoch, where the hold-out loss is measured: always the same tokens."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a row becomes."""

    ids: np.ndarray
    """As the model is given them."""
    places: np.ndarray
    """Of the tokens to be predicted, in order."""


@dataclass(frozen=True, slots=True)
class MaskedLm(Completion):
    """Tokens are hidden at random and predicted from what is left and right of them (BERT)."""

    share: float = parameter(0.15, help="of the tokens that the data marks as learnt, to be predicted", minimum=0.01,
                             maximum=0.9)  # fmt: skip
    masked: float = parameter(0.8, help="of these, replaced by the mask token", minimum=0, maximum=1)
    swapped: float = parameter(0.1, help="of these, replaced by any other token; the rest stays", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        if self.masked + self.swapped > 1 + 1e-9:
            raise ValueError("masked and swapped together at most 1")

    def places(self, mask: np.ndarray, seed: int, epoch: int, row: int) -> np.ndarray:
        """Which tokens of a row are to be predicted: at least one, where one may be."""
        return self._chosen(_random(seed, epoch, row), mask)

    def hide(self, ids: np.ndarray, mask: np.ndarray, mask_token: int, vocabulary: int, seed: int, epoch: int,
             row: int) -> Hidden:  # fmt: skip
        """The row with its chosen tokens hidden."""
        random = _random(seed, epoch, row)
        places = self._chosen(random, mask)
        lot, other = random.random(len(places)), random.integers(0, vocabulary, len(places))
        shown = ids.copy()
        shown[places] = np.where(
            lot < self.masked, mask_token, np.where(lot < self.masked + self.swapped, other, ids[places])
        )
        return Hidden(shown, places)

    def _chosen(self, random: np.random.Generator, mask: np.ndarray) -> np.ndarray:
        may = np.flatnonzero(mask)
        if not len(may):
            return may
        chosen = may[random.random(len(may)) < self.share]
        return chosen if len(chosen) else may[random.integers(0, len(may), 1)]


def _random(seed: int, epoch: int, row: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, epoch, row]))
