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
- Infill: prefix, suffix, middle, in this order, after the model's own tokens
  for gaps; the middle and its end are trained.
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
from services.common.prompt.body import Body, Chat, Gap, Pair, Text, body_of
from services.common.prompt.example import ExampleError
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import INFILL_TOKENS, Encoded, Spelled, Tokenizer

OVER_LENGTH = "over_length"
NOTHING_TRAINED = "nothing_trained"
TEMPLATE_REFUSED = "template_refused"
MASK_UNCLEAR = "mask_unclear"
NO_END_TOKEN = "no_end_token"
BAD_EXAMPLE = "bad_example"
NO_INFILL_TOKENS = "no_infill_tokens"
PREFERENCE = "preference"
Ranges = Sequence[tuple[int, int]]
"""First token, and the one after the last, of runs of trained tokens: in order, apart."""


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
    """The whole text, cut part included; of a piece, what its tokens spell."""
    ids: tuple[int, ...]
    """Kept tokens; none where the row was dropped."""
    mask: bytes
    """One for each kept token: 1 trained, 0 not."""
    cut_ids: tuple[int, ...]
    """Tokens cut off its end; all of them where the row was dropped. Where a row
    was split: those that follow the piece, and before the first also those before it."""
    piece: int = 0
    """Which window of a split row."""

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
    lead: bool = False
    """What the tokenizer sets before a plain text is still to be set before it."""
    end: bool = False
    """The end token is still to be set after it, trained."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A row with all its tokens, before any policy."""

    draft: Draft
    ids: list[int]
    ranges: Ranges
    """Trained tokens."""

    @property
    def trained_tokens(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def trained_beyond(self, length: int) -> int:
        """Trained tokens that a cut to a length would take."""
        return sum(last - max(first, length) for first, last in self.ranges if last > length)

    def mask(self) -> bytearray:
        """One byte a token: 1 trained, 0 not."""
        mask = bytearray(len(self.ids))
        for first, last in self.ranges:
            mask[first:last] = b"\x01" * (last - first)
        return mask


def make_row(
    example: datasets_pb2.Example,
    renderer: Renderer,
    tokenizer: Tokenizer,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
) -> Row:
    """The training row of an example; RowError if there is none.

    A row above the limit is an error, cut, or dropped, as over_length says
    (unspecified = error). OVER_LENGTH_SPLIT makes several: see make_rows.
    """
    (row,) = make_rows(example, renderer, tokenizer, max_length_tokens, over_length)
    return row


def make_rows(
    example: datasets_pb2.Example,
    renderer: Renderer,
    tokenizer: Tokenizer,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
) -> tuple[Row, ...]:
    """The training rows of an example, more than one only where it was split; RowError if there is none."""
    try:
        body = body_of(example, renderer.sees_parts)
    except ExampleError as e:
        raise bad(e) from None
    draft = draft_row(body, renderer, tokenizer)
    whole = whole_row(draft, tokenizer.encode(draft.text), tokenizer)
    return finish_rows(whole, tokenizer, max_length_tokens, over_length)


def bad(error: ExampleError) -> RowError:
    """What no template could be shown, as a row's error."""
    return RowError(BAD_EXAMPLE, error.turn, str(error))


def draft_row(body: Body, renderer: Renderer, tokenizer: Tokenizer) -> Draft:
    """The text of a row, rendered, and what of it is trained; RowError if that cannot be told."""
    match body:
        case Chat(messages, tools):
            return _draft_chat(messages, tools, renderer)
        case Text(prompt, completion):
            if not completion:
                raise RowError(NOTHING_TRAINED, 0, "the completion is empty, so there is nothing to learn")
            text = prompt + completion
            return Draft(text, ((len(prompt), len(text)),), lead=True, end=True)
        case Gap(prefix, middle, suffix):
            known = tokenizer.infill
            if known is None:
                raise RowError(
                    NO_INFILL_TOKENS, 0, f"the model has no tokens for gaps; looked for, each three: {INFILL_TOKENS}"
                )
            before = f"{known.prefix}{prefix}{known.suffix}{suffix}{known.middle}"
            text = before + middle + known.end
            return Draft(text, ((len(before), len(text)),), lead=True, end=not known.end)
        case Pair():
            raise RowError(
                PREFERENCE, 0, "two answers to one prompt make no training row yet; export the chosen answers as chat"
            )
    raise RowError(BAD_EXAMPLE, 0, "the example has no chat, completion, infill or preference")


def _draft_chat(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, renderer: Renderer) -> Draft:
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
    return Draft(rendered.text, spans)


def whole_row(draft: Draft, encoded: Encoded | Spelled, tokenizer: Tokenizer) -> Whole:
    """All tokens of a draft, and which are trained; RowError where none is, or where it cannot end."""
    ids, ranges = encoded.ids, ranges_of(encoded, draft.spans)
    if draft.lead and (lead := tokenizer.lead_ids):
        ids = [*lead, *ids]
        ranges = [(first + len(lead), last + len(lead)) for first, last in ranges]
    if draft.end:
        if tokenizer.eos_id is None:
            raise RowError(
                NO_END_TOKEN, 0, "tokenizer_config.json names no eos_token, so a completion cannot learn to end"
            )
        ids.append(tokenizer.eos_id)
        ranges = _joined([*ranges, (len(ids) - 1, len(ids))])
    if not ranges:
        raise RowError(NOTHING_TRAINED, 0, "no token of it is trained")
    return Whole(draft, ids, ranges)


def finish_rows(
    whole: Whole,
    tokenizer: Tokenizer,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
) -> tuple[Row, ...]:
    """What becomes of a row under a policy; RowError as make_row tells."""
    ids, length = whole.ids, len(whole.ids)
    if length <= max_length_tokens:
        return (Row(_text(whole.draft, tokenizer), tuple(ids), bytes(whole.mask()), ()),)
    if over_length == datasets_pb2.OVER_LENGTH_DROP:
        return (Row(_text(whole.draft, tokenizer), (), b"", tuple(ids)),)
    if over_length == datasets_pb2.OVER_LENGTH_TRUNCATE:
        kept = bytes(whole.mask()[:max_length_tokens])
        if not any(kept):
            raise RowError(
                NOTHING_TRAINED, 0, f"all its trained tokens lie beyond the limit of {max_length_tokens} tokens"
            )
        head, rest = tuple(ids[:max_length_tokens]), tuple(ids[max_length_tokens:])
        return (Row(_text(whole.draft, tokenizer), head, kept, rest),)
    if over_length == datasets_pb2.OVER_LENGTH_SPLIT:
        return _windows(whole, tokenizer, max_length_tokens)
    raise RowError(OVER_LENGTH, 0, f"{length} tokens; accepted: at most {max_length_tokens}", length)


def _windows(whole: Whole, tokenizer: Tokenizer, size: int) -> tuple[Row, ...]:
    """Windows that share one token with the next; those without a trained token are cut."""
    ids, mask = whole.ids, whole.mask()
    kept: list[tuple[int, int, int, bytes]] = []  # piece, first token, the one after the last, mask
    for piece, first in enumerate(range(0, len(ids) - 1, size - 1)):
        part = mask[first : first + size]
        if piece:
            part[0] = 0  # trained as the last token of the window before
        if any(part):
            kept.append((piece, first, first + len(part), bytes(part)))
    rows = []
    for number, (piece, first, end, inside) in enumerate(kept):
        next_first = kept[number + 1][1] if number + 1 < len(kept) else len(ids)
        cut = ids[end:next_first] if number else [*ids[:first], *ids[end:next_first]]
        text = "".join(tokenizer.pieces(ids[first:end]))
        rows.append(Row(text, tuple(ids[first:end]), inside, tuple(cut), piece))
    return tuple(rows)


def _text(draft: Draft, tokenizer: Tokenizer) -> str:
    if not (draft.lead or draft.end):
        return draft.text
    lead = tokenizer.pieces(tokenizer.lead_ids) if draft.lead else []
    end = tokenizer.pieces([tokenizer.eos_id]) if draft.end and tokenizer.eos_id is not None else []
    return "".join([*lead, draft.text, *end])


def ranges_of(encoded: Encoded | Spelled, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of tokens that share a character with a span."""
    found = []
    for begin, end in spans:
        if begin < end:
            place = encoded.range_of(begin, end)
            if place is None and isinstance(encoded, Encoded):  # a character that no token holds: all offsets must tell
                mask = mask_of(encoded.offsets, spans)
                return _joined([(n, n + 1) for n, trained in enumerate(mask) if trained])
            assert place is not None
            found.append(place)
    return _joined(found)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


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
