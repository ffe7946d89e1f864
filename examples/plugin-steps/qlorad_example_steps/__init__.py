"""Two steps: one that changes rows, one that leaves rows out.

A step is a frozen dataclass. Its fields are the parameters; its docstring's
first line is what `qlorad dataset steps` tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.datasets.worker.steps import api


@dataclass(frozen=True, slots=True)
class ReplaceTerms:
    """Writes other terms in place of given ones, whole words only."""

    terms: Mapping[str, str] = api.parameter(help="old term to new term", minimum=1, maximum=1000)
    where: str = api.where()

    def apply(self, example: api.Plain) -> api.Plain:
        """The very example where no term stands in it."""
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, self.terms))})\b")
        return api.map_texts(example, lambda text: pattern.sub(lambda m: self.terms[m[0]], text), self.where)


@dataclass(frozen=True, slots=True)
class DropPhrases:
    """Leaves out rows with an answer that holds one of some phrases, as in "as a language model"."""

    phrases: tuple[str, ...] = api.parameter(help="what no answer may hold, in any case", minimum=1, maximum=1000)

    def apply(self, example: api.Plain) -> api.Plain | None:
        """None leaves the row out; it is counted by the step's name."""
        said = "\n".join(api.answers(example)).lower()
        return None if any(phrase.lower() in said for phrase in self.phrases) else example
