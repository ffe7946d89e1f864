"""Examples as lines, golden renderings, the sandbox, pieces, and what is never imported."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, datasets_pb2, errors_pb2, messages_pb2
from services.common import artifacts
from services.common.errors import Fault
from services.common.prompt import example, golden, probes
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, chat, digest_of, seal_model, write_model

USER = [{"role": "user", "content": "hi"}]

TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def examples(draw: st.DrawFn) -> datasets_pb2.Example:
    made = datasets_pb2.Example(origin=datasets_pb2.Origin(file=draw(TEXT), line=draw(st.integers(0, 2**40))))
    made.metadata.update(draw(st.dictionaries(TEXT, JSON, max_size=3)))
    if draw(st.booleans()):
        made.completion.prompt, made.completion.completion = draw(TEXT), draw(TEXT)
        return made
    for _ in range(draw(st.integers(0, 4))):
        message = made.chat.messages.add(role=draw(st.sampled_from(messages_pb2.Role.values())))
        for text in draw(st.lists(TEXT, max_size=2)):
            message.parts.add(text=text)
        message.tool_call_id = draw(TEXT)
    made.chat.tools.add(name=draw(TEXT), parameters_json=json.dumps(draw(st.dictionaries(TEXT, JSON, max_size=2))))
    return made


@settings(max_examples=150, deadline=None)
@given(examples())
def test_an_example_comes_back_from_its_line(made: datasets_pb2.Example) -> None:
    line = example.dumps(made)
    assert b"\n" not in line
    assert example.loads(line) == made
    again = datasets_pb2.Example.FromString(made.SerializeToString(deterministic=True))
    assert example.dumps(again) == line


def test_a_line_is_compact_canonical_json() -> None:
    made = chat(("user", "தமிழ்\n"), line=3)
    made.metadata.update({"b": 1, "a": "x"})
    assert example.dumps(made).decode() == (
        '{"chat":{"messages":[{"parts":[{"text":"தமிழ்\\n"}],"role":"ROLE_USER"}]},'
        '"metadata":{"a":"x","b":1},"origin":{"file":"rows.jsonl","line":"3"}}'
    )


@pytest.mark.parametrize("line", [b"", b"[]", b'{"chit": 1}', b"\xff", b'{"chat": {"messages": 3}}', b"[" * 3000])
def test_a_line_that_is_no_example_is_an_error(line: bytes) -> None:
    with pytest.raises(example.ExampleError):
        example.loads(line)


def test_numbers_without_a_json_form_are_refused() -> None:
    made = chat(("user", "a"))
    made.metadata.update({"x": float("nan")})
    with pytest.raises(example.ExampleError, match="finite"):
        example.dumps(made)


def test_what_a_template_sees() -> None:
    talk = messages_pb2.Conversation()
    talk.messages.add(role=messages_pb2.ROLE_USER, name="Ann").parts.add(text="a")
    talk.messages[0].parts.add(text="b")
    call = talk.messages.add(role=messages_pb2.ROLE_ASSISTANT).tool_calls.add(
        name="f", arguments_json='{"z": 1, "a": 2}'
    )
    answer = talk.messages.add(role=messages_pb2.ROLE_TOOL, tool_call_id="c1")
    answer.parts.add(text="r")
    messages, tools = example.as_template_sees(talk)
    assert tools is None
    assert messages == [
        {"role": "user", "content": "ab", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
    ]
    assert list(messages[1]["tool_calls"][0]["function"]["arguments"]) == ["z", "a"], "the order of keys is kept"
    call.id = "c1"
    talk.tools.add(name="f", description="d")
    messages, tools = example.as_template_sees(talk)
    assert messages[1]["tool_calls"][0]["id"] == "c1"
    no_parameters = {"type": "object", "properties": {}}
    assert tools == [{"type": "function", "function": {"name": "f", "description": "d", "parameters": no_parameters}}]


# golden renderings


def opened(folder: pathlib.Path, source: str | None, **config: Any) -> Renderer:
    return Renderer.open(write_model(folder, source, **config), DATE)


def stored(entries: tuple[dict[str, Any], ...]) -> Any:
    """As a manifest gives them back."""
    manifest = artifacts_pb2.Manifest()
    manifest.facts.update({"golden": list(entries)})
    return artifacts.facts_of(json_format.Parse(json_format.MessageToJson(manifest), artifacts_pb2.Manifest()))[
        "golden"
    ]


def test_golden_renderings_hold_through_a_manifest(tmp_path: pathlib.Path) -> None:
    for shape in shapes.ALL:
        renderer = opened(tmp_path / shape.name, shape.source)
        made = golden.make(renderer)
        assert 4 <= len(made) <= 6
        assert any("refused" in e for e in made) == (not shape.system or not shape.tools)
        golden.check(renderer, stored(made))
    assert golden.make(opened(tmp_path / "none", None)) == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("\n' }}", " ' }}"), "'one turn': first differs at byte 16"),
        (("message.tool_calls or []", "[]"), "'tools': first differs"),
        (("messages %}", "messages[:2] %}"), "'system and turns': first differs"),
        (("message.content + '<|im_end|>'", "message.content.strip() + '<|im_end|>'"), "'blanks': first differs"),
    ],
)
def test_a_changed_template_is_refused_by_name(tmp_path: pathlib.Path, change: tuple[str, str], told: str) -> None:
    made = golden.make(opened(tmp_path / "then", shapes.CHATML_MARKED.source))
    changed = shapes.CHATML_MARKED.source.replace(*change)
    assert changed != shapes.CHATML_MARKED.source
    with pytest.raises(Fault) as caught:
        golden.check(opened(tmp_path / "now", changed), made)
    assert caught.value.reason == errors_pb2.REASON_REJECTED
    assert told in caught.value.message


def test_a_refusal_must_stay_a_refusal(tmp_path: pathlib.Path) -> None:
    refusing, taking = opened(tmp_path / "a", shapes.GEMMA.source), opened(tmp_path / "b", shapes.CHATML.source)
    with pytest.raises(Fault, match="refuses the conversation"):
        golden.check(refusing, [e for e in golden.make(taking) if e["name"] == "system and turns"])
    with pytest.raises(Fault, match="was refused by"):
        golden.check(taking, [e for e in golden.make(refusing) if e["name"] == "system and turns"])
    with pytest.raises(Fault, match="cannot be read"):
        golden.check(taking, [{"name": "x"}])
    with pytest.raises(Fault, match="cannot be read"):
        golden.check(taking, [{"name": "x", "conversation": "[]", "text": "", "generation_prompt": False}])
    with pytest.raises(Fault, match="no chat template"):
        golden.check(opened(tmp_path / "c", None), golden.make(taking))


# the renderer


def test_digests_name_what_they_say(tmp_path: pathlib.Path) -> None:
    import hashlib

    folder = write_model(tmp_path / "m", shapes.CHATML.source)
    renderer = Renderer.open(folder, DATE)
    assert renderer.tokenizer_digest == digest_of(folder / "tokenizer.json")
    assert renderer.template_digest == "sha256:" + hashlib.sha256(shapes.CHATML.source.encode()).hexdigest()
    assert renderer.has_template and not renderer.has_generation_marks
    in_config = opened(tmp_path / "c", None, chat_template=shapes.CHATML.source)
    assert in_config.template_digest == renderer.template_digest and in_config.digest == renderer.digest
    assert Renderer.open(folder, "2026-02-04").digest != renderer.digest
    assert opened(tmp_path / "marked", shapes.PHI.source).has_generation_marks
    bare = opened(tmp_path / "bare", None)
    assert (bare.has_template, bare.has_generation_marks, bare.template_digest) == (False, False, "")
    with pytest.raises(RenderError, match="no chat template"):
        bare.render(USER)


def test_older_folders_keep_special_tokens_beside(tmp_path: pathlib.Path) -> None:
    folder = write_model(tmp_path / "m", "{{ cls_token }}{{ unk_token }}", cls_token=None)
    (folder / "special_tokens_map.json").write_text('{"cls_token": {"content": "<c>"}, "unk_token": "<u>"}')
    assert Renderer.open(folder, DATE).render(USER).text == "<c><u>"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (("chat_template.jinja", b"{% for %}"), "line 1"),
        (("chat_template.jinja", b"\xff\xfe"), "UTF-8"),
        (("tokenizer_config.json", b"{"), "not JSON"),
        (("tokenizer_config.json", b"[]"), "a JSON object"),
        (("tokenizer.json", None), "is missing"),
        (("tokenizer.json", b"{}"), "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path: pathlib.Path, spoil: tuple[str, bytes | None], told: str) -> None:
    folder = write_model(tmp_path / "m", shapes.CHATML.source)
    name, content = spoil
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(Fault, match=told) as caught:
        Renderer.open(folder, DATE)
        Tokenizer.open(folder)
    assert caught.value.reason == errors_pb2.REASON_REJECTED and name in caught.value.message


def test_wrong_dates_and_nameless_templates_are_refused(tmp_path: pathlib.Path) -> None:
    folder = write_model(tmp_path / "m", shapes.CHATML.source)
    for date in ("", "today", "2026-13-01"):
        with pytest.raises(Fault, match="template_date"):
            Renderer.open(folder, date)
    with pytest.raises(Fault, match="'default'"):
        opened(tmp_path / "n", None, chat_template=[{"name": "rag", "template": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
        "{{ dict.update(messages[0], {'role': 'system'}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ strftime_now.__self__.__class__.__subclasses__() }}",
        "{{ range(100000000) | list }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing(tmp_path: pathlib.Path, source: str) -> None:
    with pytest.raises(RenderError):
        opened(tmp_path / "m", source).render(USER)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[5].content }}", "{{ 'a' + 1 }}", "{{ nothing() }}"])
def test_a_failing_template_is_a_typed_error_and_no_refusal(tmp_path: pathlib.Path, source: str) -> None:
    with pytest.raises(RenderError) as caught:
        opened(tmp_path / "m", source).render(USER)
    assert not caught.value.refused and caught.value.message


def test_a_refusal_carries_the_templates_words(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RenderError, match=r"^no thanks$") as caught:
        opened(tmp_path / "m", "{{ raise_exception('no thanks') }}").render(USER)
    assert caught.value.refused


def test_threads_do_not_mix_spans(tmp_path: pathlib.Path) -> None:
    renderer = opened(tmp_path / "m", shapes.CHATML_MARKED.source)
    wrong: list[object] = []

    def work(mark: str) -> None:
        talk = [{"role": "user", "content": mark * 40}, {"role": "assistant", "content": mark}] * 20
        expected = renderer.render(talk)
        wrong.extend(r for r in (renderer.render(talk) for _ in range(20)) if r != expected)
        assert expected.spans is not None
        wrong.extend(s for s in expected.spans if expected.text[slice(*s)] != mark + "<|im_end|>")

    threads = [threading.Thread(target=work, args=(m,)) for m in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# tokens


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_decoding_gives_the_text_back_and_pieces_spell_it(text: str) -> None:
    tokenizer = _tokenizer()
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert len(encoded.ids) == len(encoded.offsets)
    spelled = "".join(tokenizer.pieces(encoded.ids))
    assert spelled == text or "<0x" in spelled
    assert tokenizer.encode_batch([text, "x"])[0] == encoded


def test_pieces_show_bytes_that_are_no_character() -> None:
    tokenizer = _tokenizer()
    assert tokenizer.pieces(tokenizer.encode("def<|im_end|> ").ids)[-2:] == ["<|im_end|>", " "]
    assert tokenizer.pieces(tokenizer.encode("😀").ids) == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.pieces([tokenizer.vocabulary + 5]) == [f"<{tokenizer.vocabulary + 5}?>"]


def _tokenizer() -> Tokenizer:
    import tokenizers

    from tests.common.prompt.models import tokenizer_json

    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()), "</s>")


def test_settings_of_the_saving_run_do_not_bite() -> None:
    text, tokenizer = "0 1 2 3 4 5 6 7 8 9 10", _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text, "cut at five tokens by the file's own settings"
    assert [tokenizer.decode(e.ids) for e in tokenizer.encode_batch(["0", text])] == ["0", text], "padded"


# the house


def test_two_hundred_probes_that_differ() -> None:
    assert len(probes.TEXTS) + len(probes.CONVERSATIONS) == 200
    assert len(set(probes.TEXTS)) == len(probes.TEXTS)
    shown = {json.dumps([list(p.messages), p.tools, p.add_generation_prompt]) for p in probes.CONVERSATIONS}
    assert len(shown) == len(probes.CONVERSATIONS)


def test_no_torch_no_transformers_no_grpc() -> None:
    """In a fresh process every module of the room is imported and used; the heavy ones must stay out."""
    modules = sorted(p.stem for p in pathlib.Path(golden.__file__).parent.glob("*.py") if p.stem != "__init__")
    assert len(modules) >= 9
    code = (
        "import importlib, sys\n"
        f"for m in {modules!r}: importlib.import_module('services.common.prompt.' + m)\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'grpc') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


def test_serving_needs_no_numpy() -> None:
    code = (
        "import sys; from services.common.prompt import golden, rows, example, render, tokens\n"
        "print('numpy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "False"


def test_a_sealed_model_opens_as_its_facts_say(tmp_path: pathlib.Path) -> None:
    model = seal_model(Shelf(tmp_path / "store"), shapes.QWEN.source)
    assert Renderer.open(model.payload, DATE).has_generation_marks
    assert Tokenizer.open(model.payload).eos_id == 2
