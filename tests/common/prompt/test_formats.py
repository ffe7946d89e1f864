"""The prompt formats: their exact texts, what is trained, what they refuse, and the published templates beside them."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import tempfile
from typing import Any

import jinja2
import pytest

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.errors import Fault
from services.common.prompt import formats, golden, rows
from services.common.prompt.body import body_of
from services.common.prompt.example import as_template_sees
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Tokenizer
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, chat, write_model
from tests.common.prompt.talks import talk

CHATML, ALPACA, LLAMA2, MISTRAL, PHI2, PHI3, VICUNA, PLAIN = formats.FILES
TALK = chat(("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6"))
ASKED = chat(("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"))
FIRST = "Below is an instruction that describes a task"
THEN = ". Write a response that appropriately completes the request.\n\n"


@functools.cache
def opened(prompt_format: formats.Format, eos: str | None = "</s>", bos: str | None = "<s>") -> Renderer:
    with tempfile.TemporaryDirectory() as folder:
        # A template of its own, which must not be heard.
        payload = write_model(pathlib.Path(folder), shapes.GEMMA.source, eos_token=eos, bos_token=bos)
        return Renderer.open(payload, DATE, prompt_format)


def rendered(prompt_format: formats.Format, example: datasets_pb2.Example, prompt: bool = False) -> tuple[str, str]:
    """The text, and what of it is trained."""
    renderer = opened(prompt_format)
    messages, tools = as_template_sees(example.chat, renderer.sees_parts)
    made = renderer.render(messages, tools, prompt)
    assert made.spans is not None
    return made.text, "|".join(made.text[a:b] for a, b in made.spans)


def tool_talk() -> datasets_pb2.Example:
    made = chat(("user", "sky?"), ("assistant", ""), ("tool", '{"sky": "blue"}'), ("assistant", "Blue."))
    call = made.chat.messages[1].tool_calls.add(id="call00001", name="look", arguments_json='{"at": "சென்னை"}')
    made.chat.messages[2].tool_call_id = call.id
    made.chat.tools.add(name="look", description="Looks.", parameters_json='{"type": "object", "properties": {}}')
    return made


TOOL = (
    '{"type": "function", "function": {"name": "look", "description": "Looks.", '
    '"parameters": {"type": "object", "properties": {}}}}'
)


@pytest.mark.parametrize(
    ("prompt_format", "text", "trained"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4"
            "<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n",
            "4<|im_end|>|6<|im_end|>",
        ),
        (
            ALPACA,
            "<s>Be brief.\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>"
            "\n\n### Instruction:\n3+3?\n\n### Response:\n6</s>",
            "4</s>|6</s>",
        ),
        (
            LLAMA2,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] 3+3? [/INST] 6 </s>",
            " 4 </s>| 6 </s>",
        ),
        (MISTRAL, "<s>[INST] 2+2?[/INST] 4</s>[INST] Be brief.\n\n3+3?[/INST] 6</s>", " 4</s>| 6</s>"),
        (
            PHI3,
            "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n<|user|>\n3+3?<|end|>\n"
            "<|assistant|>\n6<|end|>\n</s>",
            "4<|end|>|6<|end|>",
        ),
        (VICUNA, "<s>Be brief. USER: 2+2? ASSISTANT: 4</s>USER: 3+3? ASSISTANT: 6</s>", " 4</s>| 6</s>"),
        (PLAIN, "<s>Be brief.\n2+2?\n4</s>\n3+3?\n6</s>", "4</s>|6</s>"),
    ],
)
def test_a_conversation_becomes_exactly_this(prompt_format: formats.Format, text: str, trained: str) -> None:
    assert rendered(prompt_format, TALK) == (text, trained)


@pytest.mark.parametrize(
    ("prompt_format", "text"),
    [
        (CHATML, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
         "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"),
        (ALPACA, f"<s>{FIRST}{THEN}### Instruction:\n2+2?\n\n### Response:\n4</s>\n\n### Instruction:\n3+3?\n\n"
         "### Response:\n"),
        (LLAMA2, "<s>[INST] 2+2? [/INST] 4 </s><s>[INST] 3+3? [/INST]"),
        (MISTRAL, "<s>[INST] 2+2?[/INST] 4</s>[INST] 3+3?[/INST]"),
        (PHI2, "Instruct: 2+2?\nOutput: 4</s>\nInstruct: 3+3?\nOutput:"),
        (PHI3, "<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n<|user|>\n3+3?<|end|>\n<|assistant|>\n"),
        (VICUNA, "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
         "helpful, detailed, and polite answers to the user's questions. "
         "USER: 2+2? ASSISTANT: 4</s>USER: 3+3? ASSISTANT:"),
        (PLAIN, "<s>2+2?\n4</s>\n3+3?\n"),
    ],
)  # fmt: skip
def test_a_question_becomes_exactly_this_prompt(prompt_format: formats.Format, text: str) -> None:
    assert rendered(prompt_format, ASKED, prompt=True)[0] == text
    # What is trained stands right behind it: the answer begins where the prompt ends.
    whole = chat(("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6"))
    assert rendered(prompt_format, whole)[0].startswith(text)


def test_alpaca_tells_instruction_and_input_apart() -> None:
    made = chat(("user", "Add them."), ("assistant", "5"))
    made.chat.messages[0].parts.add(text="\n\n2 and 3")
    expected = (
        f"<s>{FIRST}, paired with an input that provides further context{THEN}"
        "### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n5</s>"
    )
    assert rendered(ALPACA, made) == (expected, "5</s>")
    alone = chat(("user", "Add 2 and 3."), ("assistant", "5"))
    assert rendered(ALPACA, alone)[0] == f"<s>{FIRST}{THEN}### Instruction:\nAdd 2 and 3.\n\n### Response:\n5</s>"
    assert "2 and 3" in rendered(CHATML, made)[0], "the other formats join the parts"


def test_chatml_carries_tools() -> None:
    text, trained = rendered(CHATML, tool_talk())
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call") and f"<tools>\n{TOOL}\n</tools>" in text
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "சென்னை"}}\n</tool_call><|im_end|>'
    assert trained == call + "|Blue.<|im_end|>"
    assert '<|im_start|>user\n<tool_response>\n{"sky": "blue"}\n</tool_response><|im_end|>\n' in text


def test_mistral_carries_tools() -> None:
    text, trained = rendered(MISTRAL, tool_talk())
    assert text.startswith(f"<s>[AVAILABLE_TOOLS] [{TOOL}][/AVAILABLE_TOOLS][INST] sky?[/INST][TOOL_CALLS] [")
    call = '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "சென்னை"}, "id": "call00001"}]</s>'
    assert trained == call + "| Blue.</s>"
    assert '[TOOL_RESULTS] {"content": {"sky": "blue"}, "call_id": "call00001"}[/TOOL_RESULTS]' in text
    said = tool_talk()
    said.chat.messages[2].parts[0].text = 'a "blue" sky'
    assert '{"content": "a \\"blue\\" sky", "call_id"' in rendered(MISTRAL, said)[0]


def refusal(prompt_format: formats.Format, example: datasets_pb2.Example, prompt: bool = False) -> str:
    with pytest.raises(RenderError) as caught:
        rendered(prompt_format, example, prompt)
    assert caught.value.refused
    return caught.value.message


@pytest.mark.parametrize("prompt_format", [ALPACA, LLAMA2, PHI2, PHI3, VICUNA, PLAIN])
def test_what_has_no_place_is_refused_by_field_and_never_left_out(prompt_format: formats.Format) -> None:
    whole = tool_talk()
    assert refusal(prompt_format, whole).startswith("tools: ")
    del whole.chat.tools[:]
    assert refusal(prompt_format, whole).startswith("messages[1].tool_calls: ")
    del whole.chat.messages[1].tool_calls[:]
    assert refusal(prompt_format, whole).startswith("messages[2].role: ")


@pytest.mark.parametrize("prompt_format", [ALPACA, LLAMA2, MISTRAL, PHI2, VICUNA])
def test_turns_out_of_order_are_refused(prompt_format: formats.Format) -> None:
    twice = chat(("user", "a"), ("user", "b"), ("assistant", "c"))
    assert refusal(prompt_format, twice).startswith("messages[1].role: ")
    again = chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    assert refusal(prompt_format, again).startswith("messages[2].role: ")
    first = chat(("assistant", "a"), ("user", "b"), ("assistant", "c"))
    assert refusal(prompt_format, first).startswith("messages[0].role: ")
    late = chat(("user", "a"), ("system", "b"), ("assistant", "c"))
    assert refusal(prompt_format, late).startswith("messages[1].role: ")


def test_other_refusals() -> None:
    assert "system" in refusal(PHI2, TALK)
    answered = chat(("user", "a"), ("assistant", "b"))
    for prompt_format in (ALPACA, LLAMA2, PHI2, VICUNA):
        assert "the last turn must be the user's" in refusal(prompt_format, answered, prompt=True)
    both = tool_talk()
    both.chat.messages[1].parts.add(text="I look.")
    assert refusal(MISTRAL, both).startswith("messages[1]: ")
    assert "I look.\n<tool_call>" in rendered(CHATML, both)[0]
    short = tool_talk()
    short.chat.messages[1].tool_calls[0].id = "c1"
    assert refusal(MISTRAL, short).startswith("messages[1].tool_calls[0].id: ")
    short = tool_talk()
    short.chat.messages[2].tool_call_id = ""
    assert refusal(MISTRAL, short).startswith("messages[2].tool_call_id: ")
    assert refusal(MISTRAL, chat(("system", "s"), ("assistant", "a"))).startswith("messages")


def test_special_tokens_are_the_models_own() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for prompt_format in formats.FILES:
        theirs = opened(prompt_format, "<|eot_id|>", None).render(plain).text
        ours = opened(prompt_format).render(plain).text
        assert theirs == ours.replace("<s>", "").replace("</s>", "<|eot_id|>")
    for prompt_format in (ALPACA, LLAMA2, MISTRAL, PHI2, VICUNA, PLAIN):
        with pytest.raises(RenderError, match="eos_token"):
            opened(prompt_format, None).render(plain)


def test_a_format_is_named_by_its_text(tmp_path: pathlib.Path) -> None:
    assert set(formats.FILES) == set(messages_pb2.PromptFormat.values()) - {formats.OWN}
    files = sorted((pathlib.Path(formats.__file__).parent / "formats").iterdir())
    assert sorted(p.stem for p in files) == sorted(formats.FILES.values())
    digests = set()
    for prompt_format in formats.FILES:
        renderer = opened(prompt_format)
        digest = "sha256:" + hashlib.sha256(formats.source(prompt_format).encode()).hexdigest()
        assert renderer.template_digest == digest == formats.template_digest(prompt_format, "sha256:own")
        assert renderer.has_generation_marks and renderer.prompt_format == prompt_format
        assert formats.by_name(formats.name_of(prompt_format)) == prompt_format
        digests |= {renderer.digest, digest}
    assert len(digests) == 2 * len(formats.FILES)
    assert formats.template_digest(formats.OWN, "sha256:own") == "sha256:own"
    with pytest.raises(Fault, match="PROMPT_FORMAT_CHATML"):
        formats.by_name("PROMPT_FORMAT_NEW")


def test_golden_renderings_hold_for_every_format() -> None:
    for prompt_format in formats.FILES:
        made = golden.make(opened(prompt_format))
        assert any("text" in e for e in made)
        golden.check(opened(prompt_format), made)
        with pytest.raises(Fault, match="golden rendering"):
            golden.check(opened(CHATML if prompt_format != CHATML else PHI3), made)


@pytest.mark.parametrize("prompt_format", list(formats.FILES))
def test_what_is_trained_is_what_was_said(prompt_format: formats.Format, tmp_path: pathlib.Path) -> None:
    """Over random chats: each answer is trained with its end, and nothing that the user said."""
    payload = write_model(tmp_path / "m", None)
    renderer, tokenizer = Renderer.open(payload, DATE, prompt_format), Tokenizer.open(payload)
    for seed in range(30):
        made = talk(seed, system=prompt_format != PHI2, tools=False)
        draft = rows.draft_row(body_of(made, renderer.sees_parts), renderer, tokenizer)
        whole = rows.whole_row(draft, tokenizer.encode(draft.text), tokenizer)
        trained = tokenizer.decode([i for i, m in zip(whole.ids, whole.mask(), strict=True) if m])
        said = ["".join(p.text for p in m.parts) for m in made.chat.messages if m.role == messages_pb2.ROLE_ASSISTANT]
        ends = {CHATML: "<|im_end|>", PHI3: "<|end|>"}.get(prompt_format, "</s>")
        trims, leads = prompt_format in (LLAMA2, MISTRAL), prompt_format in (LLAMA2, MISTRAL, PHI2, VICUNA)
        expected = "".join(
            (" " if leads else "") + (s.strip() if trims else s) + (" " if prompt_format == LLAMA2 else "") + ends
            for s in said
        )
        assert trained == expected


# The templates as they are published with the models, each a text of its own; but for what a comment says.
PUBLISHED: dict[formats.Format, str] = {
    CHATML: "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    LLAMA2: "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    # Without a system turn: the published one leaves it out where the last turn is the assistant's.
    MISTRAL: "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content']|trim + eos_token}}{%- endif %}{%- endfor %}",
    PHI3: "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    VICUNA: "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    "{% set turns = messages[1:] %}{% else %}{{ 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
    "{% set turns = messages %}{% endif %}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
}


@pytest.mark.parametrize("prompt_format", list(PUBLISHED))
def test_renders_as_the_published_template(prompt_format: formats.Format) -> None:
    published = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(PUBLISHED[prompt_format])
    for seed in range(200):
        made = talk(seed, system=prompt_format != MISTRAL, tools=False)
        for prompt in (False, True):
            if prompt:
                del made.chat.messages[-1]
            messages, _ = as_template_sees(made.chat)
            variables: dict[str, Any] = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
            expected = published.render(add_generation_prompt=prompt, **variables)
            assert rendered(prompt_format, made, prompt)[0] == expected, json.dumps(messages, ensure_ascii=False)


@pytest.mark.parametrize("prompt_format", [ALPACA, PHI2])
def test_renders_as_the_published_function(prompt_format: formats.Format) -> None:
    """Those that are published as a Python format string, for one question."""
    for seed in range(50):
        made = talk(seed, system=False, tools=False)
        asked, said = ("".join(p.text for p in made.chat.messages[n].parts) for n in (0, 1))
        del made.chat.messages[2:]
        if prompt_format == PHI2:
            assert rendered(prompt_format, made)[0] == f"Instruct: {asked}\nOutput: {said}</s>"
            continue
        without = f"{FIRST}{THEN}### Instruction:\n{asked}\n\n### Response:\n"
        assert rendered(prompt_format, made)[0] == f"<s>{without}{said}</s>"
