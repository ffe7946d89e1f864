"""Outputs that look as if they had been lost: hardly a word where others say much.

Law of this room: pure but for reading the spool. A dataset of short answers is
no fault, so nothing is said unless most outputs are long and few are short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from services.datasets.worker.found import WARNING, Problem
from services.datasets.worker.plain import Plain, conversations, text_of
from services.datasets.worker.spool import Spool

Array = npt.NDArray[Any]

FEWEST_WORDS = 3
LONG_WORDS = 20
"""What the middle output must have, for fewer to be a fault of single rows."""
FEW_SHARE = 0.05
"""Where more rows than that are short, it is how the dataset is."""
FEWEST_CHARACTERS = 12
"""Scripts without blanks have few words and much to say."""


def outputs(spool: Spool, keep: Array) -> tuple[Array, Problem]:
    """Places of the kept rows whose output is too short beside the others, rising, and what is to be told of them."""
    words = np.concatenate([np.zeros(0, np.uint32), *(b.entries["words"] for b in spool.blocks())])
    kept = words[keep]
    middle = float(np.median(kept)) if len(kept) else 0.0
    few = np.flatnonzero(keep & (words < FEWEST_WORDS))
    told = f"the output has fewer than {FEWEST_WORDS} words; the middle one of all has {middle:.0f}"
    problem = Problem("short_output", told, "see whether the rest of it was lost", "", WARNING)
    if middle < LONG_WORDS or not len(few) or len(few) > FEW_SHARE * len(kept):
        return few[:0], problem
    short = []
    for block in spool.blocks():
        begin, end = np.searchsorted(few, [block.first, block.first + len(block.entries)])
        places = few[begin:end]
        lines = block.chosen(places - block.first)
        short += [place for place, line in zip(places.tolist(), lines, strict=True) if _is_short(orjson.loads(line))]
    return np.array(short, np.int64), problem


def _is_short(example: Plain) -> bool:
    said = "".join(
        text_of(message)
        for path, messages in conversations(example)
        for message in messages
        if message.get("role") == "ROLE_ASSISTANT" and path != "rejected"
    )
    said += example.get("completion", {}).get("completion", "") + example.get("infill", {}).get("middle", "")
    calls = any(m.get("tool_calls") for _, messages in conversations(example) for m in messages)
    return len(said) < FEWEST_CHARACTERS and not calls
