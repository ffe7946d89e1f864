"""A small base model made on the spot, with no download.

Law of this room: reads top to bottom like the recipe it is, and is a function
of the Python patch version and the number of threads: fixed text, fixed seed,
fixed number of steps, a schedule by step and never by clock.
"""

import dataclasses
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable

# Before torch: its kernels must not pick another way on the second run.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.registry.worker import corpus

END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_BEGIN, TURN_END)
TEMPLATE_DATE = "2026-01-01"  # a constant, so that the facts are as reproducible as the bytes
TEMPLATE = pathlib.Path(__file__).with_name("chat_template.jinja")

Progress = Callable[[str, int, int, float | None], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the bytes, beside Python itself and the number of threads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    characters: int
    batch: int
    length: int
    steps: int
    learning_rate: float
    dtype: torch.dtype
    """What the weights are stored as. All are computed in fp32, which every processor is good at."""
    vocabulary: int = 2048
    seed: int = 20260101
    gain: float = 4.0
    """Where the last norm's weight begins. At 1 the tied embeddings keep the logits so flat that neither these few
    steps nor an adapter get far: the validation loss ends at 5.6 instead of 5.0, and a LoRA learns a third as much."""


TEST = Recipe(
    hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, context=1024,
    characters=1_000_000, batch=8, length=64, steps=300, learning_rate=6e-3, dtype=torch.float32,
)  # fmt: skip
DEMO = Recipe(
    hidden=256, layers=4, heads=4, kv_heads=2, intermediate=768, context=2048,
    characters=2_000_000, batch=8, length=128, steps=530, learning_rate=3e-3, dtype=torch.bfloat16,
)  # fmt: skip


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE: every text comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make(recipe: Recipe, folder: pathlib.Path, threads: int, progress: Progress) -> dict[str, object]:
    """Writes a whole model into `folder` and returns the story of its making."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)

    progress("corpus", 0, 1, None)
    texts = corpus.texts(recipe.characters)
    progress("tokenizer", 0, 1, None)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    eos = tokenizer.token_to_id(TURN_END)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=end_of_text,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(recipe.gain)
    pieces = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    data = torch.tensor([i for ids in pieces for i in (*ids, end_of_text)])
    held_out, data = data[: 64 * recipe.length], data[64 * recipe.length :]

    loss = pretrain(model, data, recipe, progress)
    with torch.no_grad():
        rows = held_out.view(-1, recipe.length)
        validation = float(model(input_ids=rows, labels=rows, use_cache=False).loss)

    progress("write", 0, 1, None)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = end_of_text
    model.to(recipe.dtype).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE.read_text()
    wrapped.save_pretrained(folder)
    return {
        "recipe": {k: str(v) for k, v in dataclasses.asdict(recipe).items()},
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_loss": loss,
        "validation_loss": validation,
    }


def pretrain(model: LlamaForCausalLM, data: torch.Tensor, recipe: Recipe, progress: Progress) -> float:
    """Next-token prediction on random windows; returns the mean loss of the last tenth."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    windows = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe.steps)
        starts = torch.randint(len(data) - recipe.length, (recipe.batch,), generator=windows).tolist()
        rows = torch.stack([data[s : s + recipe.length] for s in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        progress("train", step + 1, recipe.steps, losses[-1])
    model.eval()
    last = losses[-max(1, recipe.steps // 10) :]
    return sum(last) / len(last)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def tokenizer_bytes(recipe: Recipe) -> bytes:
    """The tokenizer alone, as canonical JSON; what a quick check of determinism compares."""
    trained = train_tokenizer(corpus.texts(recipe.characters), recipe.vocabulary)
    return json.dumps(json.loads(trained.to_str()), sort_keys=True).encode()
