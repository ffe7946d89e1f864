"""Small model folders for tests: a real byte-level BPE, a template, no weights."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlorad.v1 import artifacts_pb2, datasets_pb2, messages_pb2
from services.common import artifacts, facts
from services.common.prompt import example
from services.common.prompt.render import Renderer
from services.common.shards import ShardWriter
from services.common.shelf import Sealed, Shelf

DATE = "2026-02-03"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<start_of_turn>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
}


@functools.cache
def tokenizer_json(trim_offsets: bool = False, lead: bool = False) -> str:
    """A byte-level BPE of 600 ids trained on this folder's own text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    here = pathlib.Path(__file__).parent
    texts = [(here / name).read_text() for name in ("models.py", "shapes.py")]
    bpe.train_from_iterator(
        [line for text in texts for line in text.splitlines(keepends=True)],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if lead:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    # Settings of the run that saved it, which must not bite.
    bpe.enable_truncation(5)
    bpe.enable_padding(pad_id=0, pad_token="<pad>")
    return str(bpe.to_str())


@functools.cache
def sentencepiece_json(legacy: bool) -> str:
    """A BPE in the form of Llama's: blanks as U+2581, bytes where a character is unknown, a BOS set before texts.

    Legacy ones set a blank before every piece of text between special tokens, the others before the first only.
    """
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    bpe = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    here = pathlib.Path(__file__).parent
    bpe.train_from_iterator(
        (here / "shapes.py").read_text().splitlines(),
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", *SPECIAL[1:], *bytes_],
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
            show_progress=False,
        ),
    )
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # The trainer knows byte tokens as special ones only; in such files they are plain vocabulary.
    told = json.loads(bpe.to_str())
    told["added_tokens"] = [t for t in told["added_tokens"] if t["content"] not in set(bytes_)]
    return json.dumps(told)


def write_model(
    folder: pathlib.Path, template: str | None, lead: bool = False, trim_offsets: bool = False, **config: Any
) -> pathlib.Path:
    """A model folder as far as prompts go. Config values of None are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(trim_offsets, lead), encoding="utf-8")
    told = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def seal_model(shelf: Shelf, template: str | None, date: str = DATE, context: int = 512, **settings: Any) -> Sealed:
    """A sealed model without weights."""
    staged = shelf.stage()
    write_model(staged.payload, template, **settings)
    renderer = Renderer.open(staged.payload, date)
    about = facts.ModelFacts(
        architecture="LlamaForCausalLM",
        family="llama",
        parameters=0,
        nf4_bytes=0,
        context_tokens=context,
        vocabulary=600,
        target_modules=("q_proj",),
        tokenizer_digest=renderer.tokenizer_digest,
        template_digest=renderer.template_digest,
        template_has_generation_marks=renderer.has_generation_marks,
        template_date=date,
        eos_token_ids=(2,),
    )
    return shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, facts.to_facts(about))


def seal_dataset(shelf: Shelf, splits: dict[str, list[datasets_pb2.Example]]) -> Sealed:
    """A sealed dataset of examples."""
    staged = shelf.stage()
    for split, rows in splits.items():
        with ShardWriter(staged.payload, split) as writer:
            for row in rows:
                writer.add(example.dumps(row))
    return shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_DATASET, {"rows": sum(map(len, splits.values()))})


def chat(*turns: tuple[str, str], line: int = 1) -> datasets_pb2.Example:
    """A chat example of (role, text) pairs."""
    made = datasets_pb2.Example(origin=datasets_pb2.Origin(file="rows.jsonl", line=line))
    for role, text in turns:
        message = made.chat.messages.add(role=messages_pb2.Role.Value(f"ROLE_{role.upper()}"))
        message.parts.add(text=text)
    return made


def completion(prompt: str, text: str, line: int = 1) -> datasets_pb2.Example:
    """A completion example."""
    return datasets_pb2.Example(
        completion=datasets_pb2.Completion(prompt=prompt, completion=text),
        origin=datasets_pb2.Origin(file="rows.jsonl", line=line),
    )


def digest_of(path: pathlib.Path) -> str:
    return "sha256:" + artifacts.sha256_file(path)
