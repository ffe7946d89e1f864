"""Byte-equal with transformers: rendering, assistant mask, token ids, over a table of template shapes."""

from __future__ import annotations

import datetime
import functools
import pathlib
from typing import Any

import pytest

from services.common.prompt import golden, probes, rows
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Tokenizer
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, sentencepiece_json, write_model

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Ort> & 'mehr'",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"place": "சென்னை", "n": 1.0}},
        }
    ],
}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one": ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}], None),
    "system": (
        [
            {"role": "system", "content": " Be brief. "},
            {"role": "user", "content": "x = 1\n"},
            {"role": "assistant", "content": "  y = 2\n\n"},
        ],
        None,
    ),
    "turns": (
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": ""},
        ],
        None,
    ),
    "user-last": ([{"role": "user", "content": "only a question?"}], None),
    "scripts": (
        [
            {"role": "user", "content": "வணக்கம் உலகம் 你好，世界 👩‍👩‍👧🏽 שלום \u202bمرحبا\u202c"},
            {"role": "assistant", "content": "நன்றி 很好 e\u0301 🇮🇳"},
        ],
        None,
    ),
    "markup": (
        [
            {"role": "user", "content": "<a href='x'>&amp;</a> {{ 7 * 7 }} {% raw %} </s> <|im_end|>"},
            {"role": "assistant", "content": '"quoted" \\n \t\''},
        ],
        None,
    ),
    "tools": (
        [
            {"role": "user", "content": "weather?"},
            CALL,
            {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "call00001", "name": "get_weather"},
            {"role": "assistant", "content": "Clear."},
        ],
        [TOOL],
    ),
    "tools-unused": ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}], [TOOL]),
    "order": ([{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "fine"}], None),
}
MARKED = [s.name for s in shapes.ALL if s.marked]
CASES = [(s.name, c) for s in shapes.ALL for c in CONVERSATIONS]


class _Fixed(datetime.datetime):
    """The oracle's clock, stopped on the manifest's date."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Fixed:
        return cls.fromisoformat(DATE)


@pytest.fixture(autouse=True, scope="module")
def stopped_clock() -> Any:
    from transformers.utils import chat_template_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _Fixed)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model folders by shape, as transformers itself saves them."""
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> tuple[pathlib.Path, Any]:
        shape = next(s for s in shapes.ALL if s.name == name)
        raw = write_model(root / f"{name}-raw", shape.source)
        loaded = PreTrainedTokenizerFast.from_pretrained(raw)
        loaded.save_pretrained(root / name)
        return root / name, PreTrainedTokenizerFast.from_pretrained(root / name)

    return make


def _oracle_text(oracle: Any, messages: Any, tools: Any, prompt: bool) -> str | None:
    import jinja2

    try:
        return str(oracle.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except (jinja2.TemplateError, TypeError):
        return None


@pytest.mark.parametrize(("shape", "conversation"), CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_the_same_bytes(folders: Any, shape: str, conversation: str, prompt: bool) -> None:
    folder, oracle = folders(shape)
    messages, tools = CONVERSATIONS[conversation]
    expected = _oracle_text(oracle, messages, tools, prompt)
    renderer = Renderer.open(folder, DATE)
    if expected is None:
        with pytest.raises(RenderError):
            renderer.render(messages, tools, prompt)
    else:
        assert renderer.render(messages, tools, prompt).text.encode() == expected.encode()


def test_the_table_is_wide_enough(folders: Any) -> None:
    rendered = [
        _oracle_text(folders(s)[1], *CONVERSATIONS[c], False) is not None  # type: ignore[arg-type]
        for s, c in CASES
    ]
    assert len(shapes.ALL) >= 10
    assert sum(s.marked for s in shapes.ALL) >= 3
    assert sum(rendered) >= 85
    assert rendered.count(False) >= 3, "some shapes must refuse something"


@pytest.mark.parametrize(("shape", "conversation"), [(s, c) for s, c in CASES if s in MARKED])
def test_masks_the_same_tokens(folders: Any, shape: str, conversation: str) -> None:
    folder, oracle = folders(shape)
    messages, tools = CONVERSATIONS[conversation]
    if _oracle_text(oracle, messages, tools, False) is None:
        with pytest.raises(RenderError):
            Renderer.open(folder, DATE).render(messages, tools)
        return
    expected = oracle.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    rendered = Renderer.open(folder, DATE).render(messages, tools)
    encoded = Tokenizer.open(folder).encode(rendered.text)
    assert list(encoded.ids) == expected["input_ids"]
    assert rendered.spans is not None
    assert list(rows.mask_of(encoded.offsets, rendered.spans)) == expected["assistant_masks"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("shape", [shapes.CHATML_MARKED, shapes.PHI, shapes.GEMMA])
def test_sentencepiece_tokenizers_mask_and_encode_alike(
    tmp_path: pathlib.Path, legacy: bool, shape: shapes.Shape
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_model(tmp_path / "m", shape.source, pad_token=None, unk_token="<unk>")
    (folder / "tokenizer.json").write_text(sentencepiece_json(legacy))
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    renderer, tokenizer = Renderer.open(folder, DATE), Tokenizer.open(folder)
    assert tokenizer.lead_ids == (1,)
    for messages, tools in CONVERSATIONS.values():
        if _oracle_text(oracle, messages, tools, False) is None:
            continue
        expected = oracle.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = renderer.render(messages, tools)
        encoded = tokenizer.encode(rendered.text)
        assert list(encoded.ids) == expected["input_ids"]
        assert rendered.spans is not None
        mask = rows.mask_of(encoded.offsets, rendered.spans)
        last = {end - 1 for _, end in rendered.spans}
        for n, (ours, theirs) in enumerate(zip(mask, expected["assistant_masks"], strict=True)):
            # The blank that legacy files set before a newline spells it together with the newline's byte.
            assert ours == theirs or (legacy and ours == 1 and encoded.offsets[n][0] in last)
    for text in probes.TEXTS:
        assert tokenizer.encode_prompt(text) == oracle(text)["input_ids"], "a plain prompt is as transformers has it"


def test_differs_from_the_oracle_only_in_the_last_characters_other_bytes(tmp_path: pathlib.Path) -> None:
    """A span that ends in a character of several tokens: all of them are trained, not only the first."""
    from transformers import PreTrainedTokenizerFast

    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    source = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}" + marked + "{% endif %}|{% endfor %}"
    folder = write_model(tmp_path / "open-ended", source)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "நன்றி"}]
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    rendered = Renderer.open(folder, DATE).render(messages)
    tokenizer = Tokenizer.open(folder)
    encoded = tokenizer.encode(rendered.text)
    assert rendered.spans is not None
    mask = list(rows.mask_of(encoded.offsets, rendered.spans))
    assert tokenizer.decode([i for i, m in zip(encoded.ids, mask, strict=True) if m]) == "நன்றி"
    differing = [n for n, (a, b) in enumerate(zip(mask, expected["assistant_masks"], strict=True)) if a != b]
    last = rendered.text.index("நன்றி") + len("நன்றி") - 1
    assert differing, "the oracle stops early here; if it no longer does, rows.py's header is out of date"
    assert all(mask[n] == 1 and encoded.offsets[n] == (last, last + 1) for n in differing)


def test_trimmed_offsets_lose_no_blanks(tmp_path: pathlib.Path) -> None:
    """A tokenizer.json may ask for offsets without blanks: a trained blank at an edge would fall out of the mask."""
    source = "{% for m in messages %}<|end|>{% generation %}{{ m.content }}{% endgeneration %}<|end|>{% endfor %}"
    folder = write_model(tmp_path / "trim", source, trim_offsets=True)
    renderer, tokenizer = Renderer.open(folder, DATE), Tokenizer.open(folder)
    rendered = renderer.render([{"role": "assistant", "content": "   a  "}])
    encoded = tokenizer.encode(rendered.text)
    assert rendered.spans is not None
    mask = rows.mask_of(encoded.offsets, rendered.spans)
    assert tokenizer.decode([i for i, m in zip(encoded.ids, mask, strict=True) if m]) == "   a  "


def test_probes_render_and_encode_alike(folders: Any) -> None:
    assert len(probes.TEXTS) + len(probes.CONVERSATIONS) == 200
    for shape in ("chatml-marked", "qwen-tools", "llama3-date"):
        folder, oracle = folders(shape)
        renderer, tokenizer = Renderer.open(folder, DATE), Tokenizer.open(folder)
        for text in probes.TEXTS:
            assert list(tokenizer.encode(text).ids) == oracle(text, add_special_tokens=False)["input_ids"]
        for probe in probes.CONVERSATIONS:
            expected = _oracle_text(oracle, list(probe.messages), probe.tools, probe.add_generation_prompt)
            if expected is None:
                with pytest.raises(RenderError):
                    renderer.render(probe.messages, probe.tools, probe.add_generation_prompt)
            else:
                assert renderer.render(probe.messages, probe.tools, probe.add_generation_prompt).text == expected


def test_named_templates_are_chosen_alike(tmp_path: pathlib.Path) -> None:
    from transformers import PreTrainedTokenizerFast

    named = [
        {"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools {{ tools | length }} {{ messages[0].content }}{{ image_token }}"},
    ]
    sep = {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": False}
    sep |= {"single_word": False, "normalized": False}
    folder = write_model(
        tmp_path / "named",
        None,
        chat_template=named,
        image_token="<img>",
        sep_token=sep,
    )
    oracle, renderer = PreTrainedTokenizerFast.from_pretrained(folder), Renderer.open(folder, DATE)
    for tools in (None, [TOOL]):
        messages = [{"role": "user", "content": "hi"}]
        assert renderer.render(messages, tools).text == _oracle_text(oracle, messages, tools, False)
    assert renderer.render([{"role": "user", "content": "hi"}], [TOOL]).text == "tools 1 hi<img>"
    assert renderer.special_tokens["sep_token"] == "<s>"


def test_golden_renderings_equal_the_oracle(folders: Any) -> None:
    for shape in shapes.ALL:
        folder, oracle = folders(shape.name)
        for entry, probe in zip(golden.make(Renderer.open(folder, DATE)), golden.PROBES, strict=True):
            assert entry.get("text") == _oracle_text(oracle, *probe[1:])
