"""The 200 fixed probes that a model must pass before it is sealed.

Law of this room: pure, and fixed: texts and conversations over which our
tokenizer and renderer are compared with transformers' AutoTokenizer. The
comparison runs in the registry's worker, with the sealing day's date on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.prompt.golden import TOOL_TURNS, WEATHER


@dataclass(frozen=True, slots=True)
class ConversationProbe:
    """Arguments for one rendering."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool


_WORDS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "I'll, you're, it's, WE'VE, don't",
    "naïve façade, Ærøskøbing, Straße, İstanbul",
    "வணக்கம், தமிழ் எழுத்துகள் க்ஷ ஸ்ரீ",
    "नमस्ते दुनिया क्ष त्र ज्ञ",
    "你好，世界。这是一个测试！",
    "こんにちは、世界。カタカナ ｶﾀｶﾅ",
    "안녕하세요 세계 각각",
    "Здравствуй, мир! Ёлка",
    "Γειά σου Κόσμε ὦ ἄνδρες",
    "שלום עולם נִקּוּד",
    "مرحبا بالعالم ٱلسَّلَامُ",
    "สวัสดีชาวโลก น้ำ",
    "👍 👩‍👩‍👧‍👦 👋🏽 🇮🇳 ❤️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "e\u0301 é ﬁ Å Å ½ ² ①",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    'for (int i = 0; i < n; ++i) { a[i] += b["k"]; }',
    "SELECT * FROM t WHERE a <> 'b''c';",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    "<html><body class='x'>&amp; &lt;</body></html>",
    "https://example.org/a?b=c&d=%20#frag user@example.org",
    "1234567890 3.14159 1e-10 0xFF 1,000,000 ١٢٣ १२३",
    "2026-01-31T12:34:56Z +1 (555) 010-0000",
    "∀x∈ℝ: x² ≥ 0 ⇒ ∑ᵢ aᵢ ≠ ∞",
    "BRCA1 TP53 p.Val600Glu α-synuclein",
    "C:\\path\\to\\file \\n \\t \\\\",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
)
_BLANKS = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    "\r\n",
    "\r",
    " \n ",
    "a  b",
    "a   b",
    "a\n\nb",
    "a \n b",
    "a\t b",
    "a\r\nb",
    "\u00a0",
    "a\u00a0b",
    "a\u2003b\u3000c",
    "a\u200bb\u200d\ufeffc",
    "\u2028\u2029",
    "\x00\x01\x1f\x7f",
    "\u202bא\u202c",
    "\ufffd",
    "\U0010ffff",
    "\u0b95\u0bcd",
)
_LOOKALIKES = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>",
    "<|begin_of_text|><|eot_id|>",
    "[INST] hi [/INST]",
    "<<SYS>>\nx\n<</SYS>>",
    "<start_of_turn>user",
    "[CLS] [SEP] [MASK]",
    "a<s>b</s>c",
    " <s> ",
    "<S>",
    "< s>",
    "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "▁a ▁▁ Ġb Ċ",
    "<0x0A> <0xE0>",
    "### Instruction:\n",
    "<think>\nhm\n</think>",
    "<extra_id_0>",
)
TEXTS: tuple[str, ...] = (
    *_WORDS,
    *(" " + text for text in _WORDS),
    *(text + "\n" for text in _WORDS),
    *_BLANKS,
    *_LOOKALIKES,
    "a" * 300,
    "ab " * 100,
    "=" * 77,
    "\n".join(f"    {n}: line" for n in range(20)),
    "".join(chr(c) for c in range(0x20, 0x17F)),
    "".join(chr(c) for c in range(0x0B80, 0x0C00)),
    "".join(chr(c) for c in range(0x4E00, 0x4E80)),
)


def _turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


def _conversations() -> tuple[ConversationProbe, ...]:
    system = {"role": "system", "content": "You answer briefly."}
    talks: list[list[dict[str, Any]]] = [
        _turns("Hi", "Hello."),
        _turns("One?", "1", "Two?", "2"),
        _turns(" blanks ", "\nboth ends\n ", "\t", ""),
        _turns(_WORDS[4], _WORDS[6], _WORDS[14], _WORDS[11]),
        _turns("<a>&'\"</a>", "{{ x }} {% y %} {# z #}"),
        _turns("<s></s><|im_end|>", "[/INST] </s>"),
        _turns("1", "2", "3", "4", "5", "6", "7", "8"),
        _turns(_WORDS[16], "```python\nprint(1)\n```\n"),
    ]
    plain = [*talks, *([system, *talk] for talk in talks)]
    questions = [talk[:-1] for talk in plain]
    made = [ConversationProbe(talk, None, False) for talk in plain]
    made += [ConversationProbe(talk, None, True) for talk in questions]
    made += [ConversationProbe(talk, [WEATHER], False) for talk in plain[:8]]
    made += [ConversationProbe(talk, [WEATHER], True) for talk in questions[8:]]
    made += [ConversationProbe(TOOL_TURNS[:n], [WEATHER], n in (1, 3)) for n in (1, 2, 3, 4)]
    made += [ConversationProbe([system, *TOOL_TURNS], tools, False) for tools in (None, [WEATHER], [WEATHER, WEATHER])]
    made += [
        ConversationProbe([system], None, False),
        ConversationProbe([system], None, True),
        ConversationProbe(list(reversed(_turns("second", "first"))), None, False),
        ConversationProbe(_turns("a", "b") + _turns("c", "d")[1:], None, False),
        ConversationProbe(_turns("only"), None, False),
    ]
    return tuple(made)


CONVERSATIONS: tuple[ConversationProbe, ...] = _conversations()
