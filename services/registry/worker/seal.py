"""What a model must be before it is sealed, and the facts about it.

Law of this room: looks, never runs. Only safetensors, no code, JSON within
bounds; the tokenizer and the template must say what transformers' own say.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from services.common.errors import rejected, show
from services.common.facts import ModelFacts
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.safetensors_header import TensorInfo, read_model_headers
from services.registry import folder as rules
from services.registry.worker.bounded import TOKENIZER_BYTES, read_object

# Embeddings and output heads by their own last name: two-dimensional, but not what LoRA is put on.
_NOT_LINEAR = re.compile(
    r"embed\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias|lm_head|decoder|score|classifier"
)
TEMPLATE_BYTES = 1 << 20
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def inspect(folder: pathlib.Path, name: str, template_date: str) -> ModelFacts:
    """The facts of a model payload; Fault REJECTED naming what is wrong with it."""
    rules.choose(name, sorted(p.name for p in folder.iterdir()))
    config = read_object(folder / "config.json")
    architecture, family = identity(name, config)
    tensors = read_model_headers(folder)
    check_weights(folder, name, tensors)
    linear = {module_of(n) for n, t in tensors.items() if is_linear(n, t)}
    if not linear:
        raise rejected(name, "has no linear weights that LoRA could target")
    check_tokenizer_files(folder, name)
    # Only now: transformers takes seconds to import, and what is plainly wrong was refused above.
    from services.registry.worker import parity, skeleton

    skeleton.check(folder, name, architecture, family, tensors)
    parity.settle(folder, name, template_date)
    renderer = Renderer.open(folder, template_date)
    return ModelFacts(
        architecture=architecture,
        family=family,
        parameters=sum(t.count for t in tensors.values()),
        nf4_bytes=nf4_bytes(tensors),
        context_tokens=positive(name, config, _CONTEXT),
        vocabulary=positive(name, config, ("vocab_size",)),
        target_modules=tuple(sorted(linear)),
        tokenizer_digest=renderer.tokenizer_digest,
        template_digest=renderer.template_digest,
        template_has_generation_marks=renderer.has_generation_marks,
        template_date=template_date,
        eos_token_ids=end_tokens(folder, name, config),
    )


def identity(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Architecture and family; refuses code and quantised weights."""
    remote = [key for key in ("auto_map", "custom_pipelines", "trust_remote_code") if config.get(key)]
    if remote:
        raise rejected(name, f"config.json has {remote[0]!r}, which asks for remote code; accepted: models without it")
    if config.get("quantization_config"):
        raise rejected(name, "is quantised already (quantization_config); accepted: plain weights")
    told = config.get("architectures")
    if not (isinstance(told, list) and len(told) == 1 and isinstance(told[0], str)):
        raise rejected(name, "config.json does not name one architecture")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise rejected(name, "config.json names no model_type")
    return told[0], family


def check_weights(folder: pathlib.Path, name: str, tensors: Mapping[str, TensorInfo]) -> None:
    """The index tells of exactly the tensors that are there, and they are numbers that can be trained on."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        told = read_object(index, TOKENIZER_BYTES).get("weight_map")
        if not isinstance(told, dict) or set(told) != set(tensors):
            raise rejected(name, "model.safetensors.index.json tells of other tensors than the files hold")
        missing = sorted({str(f) for f in told.values()} - {p.name for p in folder.glob("*.safetensors")})
        if missing:
            raise rejected(name, f"lacks {missing[0]}, which its index names")
    elif not (folder / "model.safetensors").exists():
        raise rejected(name, "lacks model.safetensors, and an index that would name its parts")
    whole = [n for n, t in tensors.items() if is_linear(n, t) and t.dtype not in _FLOATS]
    if whole:
        raise rejected(name, f"tensor {whole[0]!r} is {tensors[whole[0]].dtype}; accepted: F32, F16, BF16")


def module_of(name: str) -> str:
    """The short name of the module that a weight belongs to."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def is_linear(name: str, tensor: TensorInfo) -> bool:
    """Whether LoRA can target the module that this weight belongs to."""
    return name.endswith(".weight") and len(tensor.shape) == 2 and not _NOT_LINEAR.fullmatch(module_of(name))


def nf4_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """About what the weights take with NF4 and double quantisation, the rest in bf16."""
    linear = sum(t.count for n, t in tensors.items() if is_linear(n, t))
    rest = sum(t.count for t in tensors.values()) - linear
    # Half a byte a weight, a byte of scale per 64, four bytes of scale's scale per 256 scales.
    return int(linear * (0.5 + 1 / 64 + 4 / (64 * 256))) + 2 * rest


def positive(name: str, config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first of some numbers that config.json has."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 40:
            return value
    raise rejected(name, f"config.json lacks {' or '.join(keys)}")


def check_tokenizer_files(folder: pathlib.Path, name: str) -> None:
    """What the libraries will read of the tokenizer is JSON within bounds and asks for no code."""
    read_object(folder / "tokenizer.json", TOKENIZER_BYTES)
    for other in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if (folder / other).exists() and read_object(folder / other, TOKENIZER_BYTES).get("auto_map"):
            raise rejected(name, f"{other} has 'auto_map', which asks for remote code; accepted: models without it")
    template = folder / "chat_template.jinja"
    if template.exists() and template.stat().st_size > TEMPLATE_BYTES:
        raise rejected(template.name, f"has {template.stat().st_size} bytes; accepted: at most {TEMPLATE_BYTES}")


def end_tokens(folder: pathlib.Path, name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end generation: of generation_config.json, else of config.json, else the tokenizer's own."""
    path = folder / "generation_config.json"
    for source in (read_object(path) if path.exists() else {}, config):
        told = source.get("eos_token_id")
        ids = told if isinstance(told, list) else [] if told is None else [told]
        if ids:
            if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                raise rejected(name, f"eos_token_id is {show(told)}; accepted: token ids")
            return tuple(sorted(set(ids)))
    eos = Tokenizer.open(folder).eos_id
    if eos is None:
        raise rejected(name, "names no token that ends generation (eos_token_id)")
    return (eos,)
