"""Which rows stay: by length, by language, by lot.

Law of this room: a row is judged by itself alone and never changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.datasets.worker import language
from services.datasets.worker.plain import Plain, weigh, words
from services.datasets.worker.steps import api


@dataclass(frozen=True, slots=True)
class MinWords:
    """Leaves out rows whose answers have fewer words together."""

    min_words: int = api.parameter(help="words that all answers of a row have at least", minimum=1, maximum=1_000_000)

    def apply(self, example: Plain) -> Plain | None:
        """Words are runs of characters between blanks."""
        return example if sum(map(words, api.answers(example))) >= self.min_words else None


@dataclass(frozen=True, slots=True)
class MaxWords:
    """Leaves out rows whose answers have more words together."""

    max_words: int = api.parameter(help="words that all answers of a row have at most", minimum=1, maximum=10_000_000)

    def apply(self, example: Plain) -> Plain | None:
        """Words are runs of characters between blanks."""
        return example if sum(map(words, api.answers(example))) <= self.max_words else None


@dataclass(frozen=True, slots=True)
class MaxCharacters:
    """Leaves out rows with more characters, prompts and answers together."""

    max_characters: int = api.parameter(help="characters of a row at most", minimum=1, maximum=1 << 30)

    def apply(self, example: Plain) -> Plain | None:
        """Metadata does not count."""
        return example if weigh(example)[1] <= self.max_characters else None


@dataclass(frozen=True, slots=True)
class KeepLanguages:
    """Leaves out rows of other languages than the named ones, as far as can be told."""

    languages: tuple[str, ...] = api.parameter(help="ISO 639-1 codes, as in en and ta", minimum=1, maximum=200)
    keep_unknown: bool = api.parameter(True, help="rows whose language cannot be told stay")

    def apply(self, example: Plain) -> Plain | None:
        """Short texts can be taken for another language."""
        found = language.of(example)
        return example if found in self.languages or (found == language.UNKNOWN and self.keep_unknown) else None


@dataclass(frozen=True, slots=True)
class Sample:
    """Keeps about a share of the rows, drawn by content and seed: the same rows in every order."""

    fraction: float = api.parameter(help="the share that stays", minimum=0.0, maximum=1.0)
    seed: int = api.parameter(0, help="another seed, another draw", minimum=0, maximum=1 << 53)

    def apply(self, example: Plain) -> Plain | None:
        """Equal rows stay or go together."""
        drawn = int.from_bytes(weigh(example)[0][:8], "little") ^ _mixed(self.seed)
        return example if _mixed(drawn) < self.fraction * (1 << 64) else None


def _mixed(value: int) -> int:
    """One number of another, far apart for neighbours (splitmix64)."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
