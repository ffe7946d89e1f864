"""Why a block is in no item: every reason has a name, and says what to do.

Law of this room: pure. A reason is a rule of findings like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.datasets.worker.documents.blocks import Block
from services.datasets.worker.found import INFO, Problem, clip

REASONS: Mapping[str, tuple[str, str]] = {
    "front_matter": ("the document's own data, no text", ""),
    "links_only": ("nothing but links", ""),
    "picture": ("a picture, which is no text", "describe it in words"),
    "navigation": ("what a page has around its text", ""),
    "page_furniture": ("what every page repeats at its head or foot", ""),
    "footnote": ("a footnote, which stands apart from what it belongs to", "write it into the text"),
    "table_of_contents": ("a table of contents", ""),
    "references": ("a list of sources or an index, which explains nothing", ""),
    "too_short": ("too few words to learn from", "write more, or join it with what stands beside it"),
    "lead_in": ("only leads to what stands below, which was taken", ""),
    "lone_heading": ("a heading with nothing below it", ""),
    "no_heading": ("prose that no heading or question asks for", "give it a heading; --format text takes all prose"),
    "code_without_prose": ("code, and no word about what it is", "give it a heading or a sentence"),
}
SHOWN = 20
"""Findings of one reason in one document; the rest are counted in one more."""


def findings(blocks: Sequence[Block], left: Mapping[int, str]) -> list[tuple[int, Problem]]:
    """What was left out, with its line: one finding for blocks that follow one another."""
    told: list[tuple[int, Problem]] = []
    shown: dict[str, int] = {}
    runs = list(_runs(left))
    for first, count, reason in runs:
        shown[reason] = shown.get(reason, 0) + 1
        if shown[reason] > SHOWN:
            continue
        why, hint = REASONS[reason]
        many = f" and {count - 1} more block{'s' * (count > 2)}" if count > 1 else ""
        text = " ".join(blocks[first].text.split())
        what = f"{clip(text)}{many}" if text else f"{count} block{'s' * (count > 1)}"
        told.append((blocks[first].span.first, Problem(reason, f"left out: {what}: {why}", hint, "", INFO)))
    for reason, count in shown.items():
        if count > SHOWN:
            why, hint = REASONS[reason]
            told.append((0, Problem(reason, f"left out {count - SHOWN} times more: {why}", hint, "", INFO)))
    return told


def _runs(left: Mapping[int, str]) -> list[tuple[int, int, str]]:
    """First block, number of blocks and reason of each stretch."""
    found: list[tuple[int, int, str]] = []
    for n in sorted(left):
        if found and found[-1][2] == left[n] and found[-1][0] + found[-1][1] == n:
            first, count, reason = found[-1]
            found[-1] = first, count + 1, reason
        else:
            found.append((n, 1, left[n]))
    return found
