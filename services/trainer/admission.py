"""How large a micro-batch a budget of memory holds, found by measuring.

Law of this room: pure; what is measured comes in as a function. Goes up from the
smallest, by what the last two measurements show a token costs, so that the budget is
neared from below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

AIM, ENOUGH = 0.95, 0.92
"""Of the budget: where the search goes, and where it is content."""
DEARER = 1.2
"""A token is taken to cost at least so many times what is told, since memory that is freed is not always given back."""
STEP_TOKENS = 64
_MOST_TRIES = 10


class OverBudget(Exception):
    """A step that does not fit the memory it may take."""


@dataclass(frozen=True, slots=True)
class Found:
    """A micro-batch that was measured."""

    tokens: int
    bytes: int


def check(measured: int, budget: int, tokens: int) -> None:
    """OverBudget where a step takes more than it may; `budget` 0 allows all."""
    if budget and measured > budget:
        raise OverBudget(
            f"a step of {tokens} tokens takes {measured} bytes, memory.budget_bytes is {budget}; "
            f"accepted: a smaller data.micro_batch_tokens (0 chooses it), or a budget of at least {measured}"
        )


def fill(measure: Callable[[int], int], least: int, most: int, budget: int, told: float = 0.0) -> Found:
    """The largest micro-batch found, at most `most` tokens; OverBudget where not even `least` fits.

    `told` is what an estimate says that a token costs: what was held for a smaller batch hides some of it.
    """
    best = Found(least, measure(least))
    check(best.bytes, budget, least)
    nearest = most + 1
    """The smallest that is known to be too large."""
    dear = max(1.0, DEARER * told)
    tokens = min(most, 2 * least, least + int((AIM * budget - best.bytes) / dear))
    for _ in range(_MOST_TRIES):
        tokens -= tokens % STEP_TOKENS if tokens - tokens % STEP_TOKENS > best.tokens else 0
        if not best.tokens < tokens < nearest or best.bytes >= ENOUGH * budget:
            break
        took = measure(tokens)
        if took > budget:
            nearest, tokens = tokens, (best.tokens + tokens) // 2
            continue
        each = max(dear, (took - best.bytes) / (tokens - best.tokens))
        best = Found(tokens, max(took, best.bytes))
        tokens = min(most, nearest - 1, 2 * tokens, tokens + int((AIM * budget - best.bytes) / each))
    return best
