"""From an example to a training row: the ONLY maker of training rows.

Law of this room: pure. Every token of a row is accounted for: kept and trained,
kept and not trained, or cut. What cannot be decided is refused, naming the turn.

Which tokens are trained:
- Chat, template with generation marks: the marked spans, ends and all.
- Chat, template without: what each assistant turn adds after the generation
  prompt, found by rendering the turns before it with the generation prompt on.
  That text must begin the text with the turn, and the text with the turn must
  begin the whole, else the place of the turn is not known.
- Completion: the completion and the end token. An empty prompt is plain text:
  all of it.
A token that is partly in a trained span is trained, and so are all tokens that
spell one character of it: a model that may write a character must learn all of
its bytes. (transformers' mask stops at the first token of a span's last
character; the two differ there and nowhere else.)
The first token of a row has nothing before it to be predicted from, so the
trainer's shift leaves it without loss whatever the mask says.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlorad.v1 import datasets_pb2
from services.common.prompt.example import ExampleError, as_template_sees
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Encoded, Tokenizer

OVER_LENGTH = "over_length"
NOTHING_TRAINED = "nothing_trained"
TEMPLATE_REFUSED = "template_refused"
MASK_UNCLEAR = "mask_unclear"
NO_END_TOKEN = "no_end_token"
BAD_EXAMPLE = "bad_example"


@dataclass(eq=False)
class RowError(Exception):
    """An example that makes no training row.

    Not frozen: Python itself sets the traceback on an exception.
    """

    rule: str
    """One of the names above."""
    turn: int
    """One-based turn at fault; 0 = the row as a whole."""
    message: str
    length_tokens: int = 0
    """For over_length: how long the row is."""

    def __str__(self) -> str:
        return f"turn {self.turn}: {self.message}" if self.turn else self.message


@dataclass(frozen=True, slots=True)
class Row:
    """A training row."""

    text: str
    """The whole text, cut part included."""
    ids: tuple[int, ...]
    """Kept tokens; none where the row was dropped."""
    mask: bytes
    """One for each kept token: 1 trained, 0 not."""
    cut_ids: tuple[int, ...]
    """Tokens cut off its end; all of them where the row was dropped."""

    @property
    def dropped(self) -> bool:
        return not self.ids

    @property
    def length_tokens(self) -> int:
        """Before any cut."""
        return len(self.ids) + len(self.cut_ids)

    @property
    def trained_tokens(self) -> int:
        return sum(self.mask)


@dataclass(frozen=True, slots=True)
class Draft:
    """A row before its tokens: the text and the characters to be trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    """Not written by a template: the tokenizer's lead and the end token are still to be set around it."""


def make_row(
    example: datasets_pb2.Example,
    renderer: Renderer,
    tokenizer: Tokenizer,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
) -> Row:
    """The training row of an example; RowError if there is none.

    A row above the limit is an error, cut, or dropped, as over_length says
    (unspecified = error).
    """
    draft = draft_row(example, renderer)
    return finish_row(draft, tokenizer.encode(draft.text), tokenizer, max_length_tokens, over_length)


def draft_row(example: datasets_pb2.Example, renderer: Renderer) -> Draft:
    """The text of a row, rendered, and what of it is trained; RowError if that cannot be told."""
    kind = example.WhichOneof("body")
    if kind == "completion":
        prompt, text = example.completion.prompt, example.completion.prompt + example.completion.completion
        if len(text) == len(prompt):
            raise RowError(NOTHING_TRAINED, 0, "the completion is empty, so there is nothing to learn")
        return Draft(text, ((len(prompt), len(text)),), plain=True)
    if kind != "chat":
        raise RowError(BAD_EXAMPLE, 0, "the example has neither a chat nor a completion")
    try:
        messages, tools = as_template_sees(example.chat)
    except ExampleError as e:
        raise RowError(BAD_EXAMPLE, e.turn, str(e)) from None
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError(NOTHING_TRAINED, 0, "no turn is the assistant's, so there is nothing to learn")
    try:
        rendered = renderer.render(messages, tools)
    except RenderError as e:
        turn = _refused_turn(messages, tools, renderer)
        raise RowError(TEMPLATE_REFUSED, turn, f"the chat template refuses it: {e}") from None
    spans = rendered.spans
    if spans is None:
        spans = _spans_from_prefixes(messages, tools, renderer, rendered.text)
    return Draft(rendered.text, spans, plain=False)


def finish_row(
    draft: Draft,
    encoded: Encoded,
    tokenizer: Tokenizer,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
) -> Row:
    """The row of a draft and its encoded text; RowError as make_row tells."""
    text, ids, mask = draft.text, list(encoded.ids), mask_of(encoded.offsets, draft.spans)
    if draft.plain:
        if tokenizer.eos_id is None:
            raise RowError(
                NO_END_TOKEN, 0, "tokenizer_config.json names no eos_token, so a completion cannot learn to end"
            )
        lead = list(tokenizer.lead_ids)
        text = "".join([*tokenizer.pieces(lead), text, *tokenizer.pieces([tokenizer.eos_id])])
        ids = [*lead, *ids, tokenizer.eos_id]
        mask = bytearray(len(lead)) + mask + b"\x01"
    if not any(mask):
        raise RowError(NOTHING_TRAINED, 0, "no token of it is trained")
    length = len(ids)
    if length <= max_length_tokens:
        return Row(text, tuple(ids), bytes(mask), ())
    if over_length == datasets_pb2.OVER_LENGTH_DROP:
        return Row(text, (), b"", tuple(ids))
    if over_length == datasets_pb2.OVER_LENGTH_TRUNCATE:
        kept = bytes(mask[:max_length_tokens])
        if not any(kept):
            raise RowError(
                NOTHING_TRAINED, 0, f"all its trained tokens lie beyond the limit of {max_length_tokens} tokens"
            )
        return Row(text, tuple(ids[:max_length_tokens]), kept, tuple(ids[max_length_tokens:]))
    raise RowError(OVER_LENGTH, 0, f"{length} tokens; accepted: at most {max_length_tokens}", length)


def mask_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bytearray:
    """One byte a token: 1 where it shares a character with a span."""
    mask = bytearray(len(offsets))
    starts = [o[0] for o in offsets]
    ends = [o[1] for o in offsets]
    for begin, end in spans:
        first = bisect.bisect_right(ends, begin)
        last = bisect.bisect_left(starts, end)
        if begin < end and first < last:
            mask[first:last] = b"\x01" * (last - first)
    return mask


def _spans_from_prefixes(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, renderer: Renderer, whole: str
) -> tuple[tuple[int, int], ...]:
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = i + 1
        try:
            before = renderer.render(messages[:i], tools, add_generation_prompt=True).text
            after = whole if turn == len(messages) else renderer.render(messages[:turn], tools).text
        except RenderError as e:
            raise RowError(
                MASK_UNCLEAR, turn, f"the chat template has no generation marks and refuses the turns up to it: {e}"
            ) from None
        if not after.startswith(before):
            raise RowError(MASK_UNCLEAR, turn, _difference("the generation prompt", before, after))
        if not whole.startswith(after):
            raise RowError(MASK_UNCLEAR, turn, _difference("the conversation up to this turn", after, whole))
        spans.append((len(before), len(after)))
    return tuple(spans)


def _difference(what: str, prefix: str, text: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    return (
        "the chat template has no generation marks, and what it renders for "
        f"{what} does not begin what it renders with more turns (first differs at character {at}: "
        f"{prefix[at : at + 20]!r} against {text[at : at + 20]!r}); accepted: a template with generation marks"
    )


def _refused_turn(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, renderer: Renderer) -> int:
    """The first turn with which the template refuses; 0 where only the whole is refused."""
    if not renderer.has_template:
        return 0
    for turn in range(1, len(messages) + 1):
        try:
            renderer.render(messages[:turn], tools)
        except RenderError:
            return turn
    return 0
