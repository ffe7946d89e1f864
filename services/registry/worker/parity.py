"""Our tokenizer and renderer against transformers' own, over fixed probes.

Law of this room: a model is sealed only if both say the same, byte for byte and
id for id, so training and serving read what its makers' code would have read.
"""

import contextlib
import datetime
import pathlib
from collections.abc import Iterator

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from services.common.errors import rejected, show
from services.common.prompt import probes
from services.common.prompt.golden import first_difference
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Tokenizer


def settle(folder: pathlib.Path, name: str, date: str) -> None:
    """Makes sure that both agree on a model folder.

    Where they differ, the tokenizer that transformers saves takes the place of
    the one that came; if they differ still, REJECTED naming the probe.
    """
    theirs = _theirs(folder, name)
    if not difference(folder, theirs, date):
        return
    try:
        theirs.save_pretrained(folder)
    except Exception as e:  # as above
        raise rejected(name, f"transformers cannot save its tokenizer: {_told(e)}") from None
    left = difference(folder, theirs, date) or difference(folder, _theirs(folder, name), date)
    if left:
        raise rejected(name, left)


def difference(folder: pathlib.Path, theirs, date: str) -> str:
    """The first probe over which our reading of a folder differs from a tokenizer of transformers; empty if none."""
    ours, renderer = Tokenizer.open(folder), Renderer.open(folder, date)
    for number, text in enumerate(probes.TEXTS, start=1):
        try:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
        except Exception as e:  # a tokenizer that cannot read a text is no match for ours, which can
            return f"text probe {number} ({show(text, 40)}) fails in transformers' AutoTokenizer: {_told(e)}"
        found = list(ours.encode(text).ids)
        if found != expected:
            at = _parting(expected, found)
            return (
                f"text probe {number} ({show(text, 40)}) gives other tokens than transformers' AutoTokenizer "
                f"from token {at}: {found[at : at + 4]} here, {expected[at : at + 4]} there"
            )
    if not renderer.has_template:
        return ""
    refused = 0
    with _today(date):
        for number, probe in enumerate(probes.CONVERSATIONS, start=1):
            try:
                expected_text = theirs.apply_chat_template(
                    list(probe.messages),
                    tools=list(probe.tools) if probe.tools is not None else None,
                    add_generation_prompt=probe.add_generation_prompt,
                    tokenize=False,
                )
            except Exception:  # a template may refuse a conversation in any way; ours must refuse it too
                expected_text = None
            found_text = _render(renderer, probe)
            refused += found_text is None
            if found_text != expected_text:
                return f"conversation probe {number} {_story(expected_text, found_text)}"
    if refused == len(probes.CONVERSATIONS):
        return f"its chat template renders none of {refused} conversations"
    return ""


def _theirs(folder: pathlib.Path, name: str):
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as e:  # whatever a stranger's files make the library do
        raise rejected(
            name, f"transformers cannot read its tokenizer: {type(e).__name__}: {show(str(e), 200)}"
        ) from None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {show(str(error), 200)}"


def _render(renderer: Renderer, probe: probes.ConversationProbe) -> str | None:
    try:
        return renderer.render(probe.messages, probe.tools, probe.add_generation_prompt).text
    except RenderError:
        return None


def _story(expected: str | None, found: str | None) -> str:
    if expected is None or found is None:
        refusing, rendering = ("transformers", "qlorad") if expected is None else ("qlorad", "transformers")
        return f"is refused by the chat template in {refusing} and rendered in {rendering}"
    a, b = expected.encode(), found.encode()
    at = first_difference(a, b)
    return f"renders otherwise than in transformers from byte {at}: {b[at : at + 24]!r} here, {a[at : at + 24]!r} there"


def _parting(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def _today(date: str) -> Iterator[None]:
    """Makes transformers' templates see the day of sealing, as ours do."""
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    kept = chat_template_utils.datetime
    chat_template_utils.datetime = Fixed
    try:
        yield
    finally:
        chat_template_utils.datetime = kept
