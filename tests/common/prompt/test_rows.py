"""Training rows: what is trained, what is cut, what is refused and how it is named."""

from __future__ import annotations

import collections
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.prompt import rows
from services.common.prompt.render import Renderer
from services.common.prompt.rows import RowError, make_row
from services.common.prompt.tokens import Tokenizer
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, chat, completion, write_model

ERROR, TRUNCATE, DROP = (
    datasets_pb2.OVER_LENGTH_ERROR,
    datasets_pb2.OVER_LENGTH_TRUNCATE,
    datasets_pb2.OVER_LENGTH_DROP,
)


@functools.cache
def opened(source: str | None, lead: bool = False, eos: str | None = "</s>") -> tuple[Renderer, Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        payload = write_model(pathlib.Path(folder), source, lead=lead, eos_token=eos)
        return Renderer.open(payload, DATE), Tokenizer.open(payload)


def row_of(example: datasets_pb2.Example, source: str | None, limit: int = 4096, policy: int = ERROR) -> rows.Row:
    return make_row(example, *opened(source), limit, datasets_pb2.OverLength.ValueType(policy))


def trained_text(row: rows.Row, source: str | None) -> str:
    _, tokenizer = opened(source)
    return tokenizer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m])


TALK = chat(("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "and 3+3?"), ("assistant", "6 ok"))


@pytest.mark.parametrize(
    ("shape", "trained"),
    [
        (shapes.CHATML, "4<|im_end|>\n6 ok<|im_end|>\n"),
        (shapes.CHATML_MARKED, "4<|im_end|>6 ok<|im_end|>"),
        (shapes.ALPACA, "4</s>\n\n6 ok</s>\n\n"),
        (shapes.LLAMA2, " 4 </s> 6 ok </s>"),
        (shapes.MISTRAL, " 4</s> 6 ok</s>"),
        (shapes.PHI, "4<|end|>\n6 ok<|end|>\n"),
        (shapes.VICUNA, " 4</s> 6 ok</s>"),
        (shapes.LLAMA3, "4<|eot_id|>6 ok<|eot_id|>"),
        (shapes.QWEN, "4<|im_end|>6 ok<|im_end|>"),
        (shapes.ZEPHYR, "4</s>\n\n6 ok</s>\n\n"),
    ],
    ids=lambda v: v.name if isinstance(v, shapes.Shape) else "",
)
def test_assistant_turns_and_their_ends_are_trained(shape: shapes.Shape, trained: str) -> None:
    assert trained_text(row_of(TALK, shape.source), shape.source) == trained


def test_marks_and_prefixes_find_the_same_turns() -> None:
    marked = row_of(TALK, shapes.CHATML_MARKED.source)
    plain = row_of(
        TALK, shapes.CHATML_MARKED.source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    )
    assert marked.text == plain.text
    # Prefixes also train the newline after the end token, which the marks leave out.
    assert all(p >= m for m, p in zip(marked.mask, plain.mask, strict=True))
    assert plain.trained_tokens == marked.trained_tokens + 2


def test_tool_calls_are_trained_and_results_are_not() -> None:
    example = chat(("user", "weather?"), ("assistant", ""), ("tool", '{"sky":"clear"}'), ("assistant", "Clear."))
    example.chat.messages[1].tool_calls.add(id="call00001", name="get_weather", arguments_json='{"place": "சென்னை"}')
    example.chat.messages[2].tool_call_id = "call00001"
    example.chat.tools.add(name="get_weather", description="d", parameters_json='{"type": "object"}')
    source = shapes.QWEN.source
    row = row_of(example, source)
    assert '"arguments": {"place": "சென்னை"}' in trained_text(row, source)
    assert "sky" in row.text and "sky" not in trained_text(row, source)


def test_a_completion_is_trained_with_its_end_and_the_prompt_is_not() -> None:
    row = row_of(completion("def add(a, b):\n", "    return a + b\n"), None)
    assert row.text == "def add(a, b):\n    return a + b\n</s>"
    assert trained_text(row, None) == "    return a + b\n</s>"
    assert row.ids[-1] == opened(None)[1].eos_id and row.mask[0] == 0


def test_plain_text_is_trained_whole() -> None:
    row = row_of(completion("", "தமிழ் மொழி"), None)
    assert trained_text(row, None) == "தமிழ் மொழி</s>" and all(row.mask)


def test_a_leading_token_of_the_tokenizer_stands_before_plain_text_and_is_not_trained() -> None:
    renderer, tokenizer = opened(None, True)
    row = make_row(completion("ab", "cd"), renderer, tokenizer, 100, ERROR)
    assert tokenizer.lead_ids == (1,)
    assert row.text == "<s>abcd</s>" and row.ids[0] == 1 and row.mask[0] == 0
    assert tokenizer.encode_prompt("ab")[0] == 1 and tokenizer.encode("ab").ids[0] != 1


def test_a_token_partly_in_the_completion_is_trained() -> None:
    _, tokenizer = opened(None)
    words = {w: list(tokenizer.encode(w).ids) for w in tokenizer.pieces(range(tokenizer.vocabulary)) if w.isalpha()}
    word, (token,) = next((w, i) for w, i in words.items() if len(i) == 1 and len(w) >= 4)
    row = row_of(completion(word[:2], word[2:]), None)
    assert row.ids == (token, tokenizer.eos_id) and row.mask == b"\x01\x01"


def test_all_bytes_of_a_trained_character_are_trained() -> None:
    row = row_of(completion("a:", "😀"), None)
    assert row.trained_tokens == 5 and trained_text(row, None) == "😀</s>"


@pytest.mark.parametrize("policy", [ERROR, datasets_pb2.OVER_LENGTH_UNSPECIFIED])
def test_too_long_is_an_error_with_the_length(policy: int) -> None:
    whole = row_of(completion("a", "b" * 50), None)
    with pytest.raises(RowError) as caught:
        row_of(completion("a", "b" * 50), None, 10, policy)
    assert caught.value.rule == rows.OVER_LENGTH
    assert caught.value.length_tokens == whole.length_tokens
    assert str(caught.value) == f"{whole.length_tokens} tokens; accepted: at most 10"
    assert row_of(completion("a", "b" * 50), None, whole.length_tokens, policy) == whole


def test_truncation_keeps_the_cut_and_dropping_keeps_it_all() -> None:
    example = completion("a", "b" * 50)
    whole = row_of(example, None)
    cut = row_of(example, None, 10, TRUNCATE)
    assert cut.ids == whole.ids[:10] and cut.cut_ids == whole.ids[10:] and cut.mask == whole.mask[:10]
    assert cut.text == whole.text
    dropped = row_of(example, None, 10, DROP)
    assert dropped.dropped and dropped.ids == () and dropped.cut_ids == whole.ids
    assert not cut.dropped


def refusal(example: datasets_pb2.Example, source: str | None, limit: int = 4096, policy: int = ERROR) -> RowError:
    with pytest.raises(RowError) as caught:
        row_of(example, source, limit, policy)
    return caught.value


def test_a_row_that_trains_nothing_is_an_error() -> None:
    assert refusal(chat(("user", "hi")), shapes.CHATML.source).rule == rows.NOTHING_TRAINED
    assert refusal(completion("prompt", ""), None).rule == rows.NOTHING_TRAINED
    assert refusal(completion("", ""), None).rule == rows.NOTHING_TRAINED
    late = refusal(completion("p" * 100, "late"), None, 10, TRUNCATE)
    assert late.rule == rows.NOTHING_TRAINED and "beyond the limit of 10" in late.message
    unmarked = (
        "{% for m in messages %}{{ m.content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert refusal(TALK, unmarked).rule == rows.NOTHING_TRAINED


def test_a_refusing_template_is_named_with_its_turn() -> None:
    error = refusal(TALK, shapes.GEMMA.source)
    assert (error.rule, error.turn) == (rows.TEMPLATE_REFUSED, 1)
    assert "System role not supported" in str(error)
    order = chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    error = refusal(order, shapes.LLAMA2.source)
    assert (error.rule, error.turn) == (rows.TEMPLATE_REFUSED, 3)
    assert refusal(TALK, None).rule == rows.TEMPLATE_REFUSED


def test_a_turn_whose_place_cannot_be_known_is_refused_and_named() -> None:
    thinking = chat(
        ("user", "a"), ("assistant", "<think>long</think>b"), ("user", "c"), ("assistant", "<think>x</think>d")
    )
    error = refusal(thinking, shapes.THINKING.source)
    assert (error.rule, error.turn) == (rows.MASK_UNCLEAR, 2)
    assert "first differs at character" in error.message
    swapped = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>>{% endif %}"
    assert refusal(TALK, swapped).turn == 3
    only_whole = "{% if messages | length < 5 %}{{ raise_exception('too few') }}{% endif %}" + shapes.CHATML.source
    error = refusal(TALK, only_whole)
    assert (error.rule, error.turn) == (rows.MASK_UNCLEAR, 3) and "too few" in error.message


def test_marks_hidden_in_a_macro_are_not_believed() -> None:
    """Where a macro holds the text back, the place of a mark is not known: prefixes decide."""
    source = (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    renderer, _ = opened(source)
    assert renderer.has_generation_marks
    row = row_of(TALK, source)
    assert trained_text(row, source) == "4<|im_end|>6 ok<|im_end|>"


def test_a_broken_tool_call_is_named() -> None:
    example = chat(("user", "a"), ("assistant", "b"))
    example.chat.messages[1].tool_calls.add(name="f", arguments_json="[1]")
    error = refusal(example, shapes.CHATML.source)
    assert (error.rule, error.turn) == (rows.BAD_EXAMPLE, 2)
    assert "messages[1].tool_calls[0].arguments_json" in str(error)
    example.chat.messages[0].role = messages_pb2.ROLE_UNSPECIFIED
    assert refusal(example, shapes.CHATML.source).turn == 1
    assert refusal(datasets_pb2.Example(), None).rule == rows.BAD_EXAMPLE


def test_a_tokenizer_without_an_end_token_cannot_take_completions() -> None:
    with pytest.raises(RowError) as caught:
        make_row(completion("a", "b"), *opened(None, False, None), 10, ERROR)
    assert caught.value.rule == rows.NO_END_TOKEN


SCRIPTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("தமிழ்你好😀👩‍👧אبn \n\t"),
    ),
    max_size=30,
)
TURNS = st.lists(st.tuples(SCRIPTS, SCRIPTS), min_size=1, max_size=4)


def _talk(turns: list[tuple[str, str]]) -> datasets_pb2.Example:
    return chat(*[pair for asked, said in turns for pair in (("user", asked), ("assistant", said))])


@settings(max_examples=120, deadline=None)
@given(TURNS)
def test_what_is_trained_is_what_the_assistant_said(turns: list[tuple[str, str]]) -> None:
    """Byte for byte, in any script: the marked template trains each answer and its end, and nothing else."""
    source = shapes.CHATML_MARKED.source
    row = row_of(_talk(turns), source)
    _, tokenizer = opened(source)
    assert trained_text(row, source) == "".join(said + "<|im_end|>" for _, said in turns)
    assert tokenizer.decode(row.ids) == row.text
    assert len(row.mask) == len(row.ids) and set(row.mask) <= {0, 1}


@settings(max_examples=80, deadline=None)
@given(TURNS)
def test_prefixes_train_the_same_and_the_blank_after_it(turns: list[tuple[str, str]]) -> None:
    source = shapes.CHATML.source
    row = row_of(_talk(turns), source)
    # The template's newline merges with nothing, since a special token stands before and after it.
    assert trained_text(row, source) == "".join(said + "<|im_end|>\n" for _, said in turns)


@settings(max_examples=80, deadline=None)
@given(TURNS, st.integers(1, 60))
def test_nothing_is_lost_by_any_policy(turns: list[tuple[str, str]], limit: int) -> None:
    source = shapes.CHATML_MARKED.source
    example = _talk(turns)
    whole = row_of(example, source)
    for policy in (ERROR, TRUNCATE, DROP):
        try:
            row = row_of(example, source, limit, policy)
        except RowError as e:
            over = len(whole.ids) > limit
            assert over and (policy == ERROR or (policy == TRUNCATE and not any(whole.mask[:limit])))
            assert e.rule == (rows.OVER_LENGTH if policy == ERROR else rows.NOTHING_TRAINED)
            continue
        assert row.ids + row.cut_ids == whole.ids and row.text == whole.text
        assert len(row.ids) <= limit and row.mask == whole.mask[: len(row.ids)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4),
)
def test_the_mask_is_the_overlap(lengths: list[int], spans: list[tuple[int, int]]) -> None:
    offsets, at = [], 0
    for length in lengths:
        offsets.append((at, at + length))
        at += length
    ordered = [(min(s), max(s)) for s in spans]
    expected = [any(max(a, b) < min(e, f) for b, f in ordered) for a, e in offsets]
    assert list(rows.mask_of(offsets, ordered)) == [int(x) for x in expected]


# quick places


@settings(max_examples=150, deadline=None)
@given(SCRIPTS, st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=3), st.booleans())
def test_ranges_are_the_overlap_whichever_way_they_are_found(
    text: str, spans: list[tuple[int, int]], special: bool
) -> None:
    _, tokenizer = opened(None)
    if special:
        text = text[:5] + "<|im_end|>" + text[5:] + "</s>"
    within = [(min(s), max(s)) for s in spans if max(s) <= len(text)]
    (quick,), plain = tokenizer.encode_many([text]), tokenizer.encode(text)
    assert list(quick.ids) == plain.ids and len(quick) == len(plain)
    expected = list(rows.mask_of(plain.offsets, within))
    for encoded in (quick, plain):
        mask = [0] * len(plain)
        for first, last in rows.ranges_of(encoded, within):
            mask[first:last] = [1] * (last - first)
        assert mask == expected


# gaps and pairs


def infill(prefix: str, middle: str, suffix: str) -> datasets_pb2.Example:
    return datasets_pb2.Example(infill=datasets_pb2.Infill(prefix=prefix, middle=middle, suffix=suffix))


def tokenizer_with(*added: str) -> Tokenizer:
    import tokenizers

    from tests.common.prompt.models import tokenizer_json

    made = tokenizers.Tokenizer.from_str(tokenizer_json())
    made.add_special_tokens(list(added))
    return Tokenizer(made, "</s>")


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), "▁<EOT>"),
        (("▁<PRE>", "▁<SUF>", "▁<MID>"), "</s>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "</s>"),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "</s>"),
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "</s>"),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "</s>"),
    ],
)
def test_a_gap_is_rendered_with_the_models_own_tokens(tokens: tuple[str, ...], end: str) -> None:
    tokenizer = tokenizer_with(*tokens)
    row = make_row(infill("def f(", "a, b", "):\n  பாடம்"), opened(None)[0], tokenizer, 100, ERROR)
    assert row.text == f"{tokens[0]}def f({tokens[1]}):\n  பாடம்{tokens[2]}a, b{end}"
    assert tokenizer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m]) == f"a, b{end}"
    assert all(tokenizer.pieces([i])[0] in tokens[:3] for i in (row.ids[0],))
    empty = make_row(infill("a", "", "b"), opened(None)[0], tokenizer, 100, ERROR)
    assert empty.trained_tokens == 1, "nothing belongs there: only the end is learnt"


def test_a_model_without_tokens_for_gaps_is_refused_telling_what_was_looked_for() -> None:
    error = refusal(infill("a", "b", "c"), None)
    assert error.rule == rows.NO_INFILL_TOKENS
    assert "▁<PRE>" in str(error) and "<|fim_prefix|>" in str(error) and "<｜fim▁begin｜>" in str(error)


def test_two_answers_make_no_row_yet() -> None:
    error = refusal(datasets_pb2.Example(preference=datasets_pb2.Preference(plain=True)), None)
    assert error.rule == rows.PREFERENCE and "export the chosen answers as chat" in str(error)


# windows

SPLIT = datasets_pb2.OVER_LENGTH_SPLIT


def windows(example: datasets_pb2.Example, source: str | None, limit: int) -> tuple[rows.Row, ...]:
    return rows.make_rows(example, *opened(source), limit, SPLIT)


def test_a_long_row_becomes_windows_that_share_a_token() -> None:
    whole = row_of(completion("", "word " * 40), None)
    made = windows(completion("", "word " * 40), None, 10)
    assert [r.piece for r in made] == list(range(len(made))) and len(made) > 3
    assert all(len(r.ids) == 10 for r in made[:-1]) and not any(r.cut_ids for r in made)
    assert all(a.ids[-1] == b.ids[0] and b.mask[0] == 0 for a, b in itertools.pairwise(made))
    assert made[0].ids + sum((r.ids[1:] for r in made[1:]), ()) == whole.ids
    assert windows(completion("", "word"), None, 10)[0] == row_of(completion("", "word"), None)


def test_windows_without_a_trained_token_are_cut() -> None:
    late = completion("p " * 60, "answer")
    whole, made = row_of(late, None), windows(late, None, 10)
    assert made[0].piece > 3 and [r.piece for r in made] == list(range(made[0].piece, made[0].piece + len(made)))
    assert made[0].cut_ids == whole.ids[: made[0].piece * 9] and not any(r.cut_ids for r in made[1:])
    assert sum(r.trained_tokens for r in made) == whole.trained_tokens
    early = chat(("user", "a"), ("assistant", "b"), ("user", "c " * 40))
    first = windows(early, shapes.CHATML_MARKED.source, 12)[0]
    assert first.piece == 0 and first.ids + first.cut_ids == row_of(early, shapes.CHATML_MARKED.source).ids


@settings(max_examples=120, deadline=None)
@given(TURNS, st.integers(2, 60))
def test_every_trained_token_is_trained_once_and_every_token_is_told(turns: list[tuple[str, str]], limit: int) -> None:
    source = shapes.CHATML_MARKED.source
    whole, made = row_of(_talk(turns), source), windows(_talk(turns), source, limit)
    assert sum(r.trained_tokens for r in made) == whole.trained_tokens
    seen: collections.Counter[int] = collections.Counter()
    trained: collections.Counter[int] = collections.Counter()
    for row in made:
        assert 1 <= len(row.ids) <= limit and any(row.mask)
        first = row.piece * (limit - 1)
        assert row.ids == whole.ids[first : first + len(row.ids)]
        for n, m in enumerate(row.mask):
            seen[first + n] += 1
            trained[first + n] += m
    assert [trained[n] for n in range(len(whole.ids))] == list(whole.mask)
    assert sum(len(r.cut_ids) for r in made) == sum(not seen[n] for n in range(len(whole.ids)))
    assert all(row.mask[0] == 0 for row in made if row.piece)


def quick(change: Callable[[Any], None]) -> Tokenizer:
    import tokenizers

    from tests.common.prompt.models import tokenizer_json

    made = tokenizers.Tokenizer.from_str(tokenizer_json())
    change(made)
    return Tokenizer(made, "</s>")


def test_places_are_counted_only_where_tokens_spell_the_text() -> None:
    from tokenizers import normalizers, pre_tokenizers

    from services.common.prompt.tokens import Encoded, Spelled

    def normalised(made: Any) -> None:
        made.normalizer = normalizers.NFC()

    def lowered(made: Any) -> None:
        made.normalizer = normalizers.Lowercase()

    def spaced(made: Any) -> None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def stripping(made: Any) -> None:
        import tokenizers

        made.add_special_tokens([tokenizers.AddedToken("<gap>", lstrip=True)])

    plain, nfc = quick(lambda made: None), quick(normalised)
    assert all(isinstance(e, Spelled) for e in plain.encode_many(["a", "நன்றி e\u0301"]))
    composed, apart = nfc.encode_many(["\u00e9 நன்றி", "e\u0301"])
    assert isinstance(composed, Spelled) and isinstance(apart, Encoded), "what NFC changes is told by offsets"
    for change in (lowered, spaced):
        assert isinstance(quick(change).encode_many(["a"])[0], Encoded)
    swallowed, whole = quick(stripping).encode_many(["a  <gap>b", "a<gap>b"])
    assert isinstance(swallowed, Encoded) and isinstance(whole, Spelled), "a token that takes blanks along"
    for tokenizer in (plain, nfc, quick(stripping)):
        for text in ("a  <gap>b", "e\u0301 x", "<s>நன்</s>"):
            (found,) = tokenizer.encode_many([text])
            assert list(found.ids) == tokenizer.encode(text).ids
            for begin in range(len(text)):
                spans = [(begin, len(text))]
                assert rows.ranges_of(found, spans) == rows.ranges_of(tokenizer.encode(text), spans)
