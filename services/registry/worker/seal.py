"""What a model must be before it is sealed, and the facts about it.

Law of this room: looks, never runs. Only safetensors, no code, JSON within
bounds; the tokenizer and the template must say what transformers' own say.
"""

import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from services.common import artifacts
from services.common.errors import rejected
from services.common.facts import ModelFacts
from services.common.safetensors_header import TensorInfo, read_model_headers
from services.registry import folder as rules
from services.registry.worker.bounded import TOKENIZER_BYTES, read_object

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Embeddings and output heads: two-dimensional, but not what LoRA is put on.
_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|lm_head|embed_out|shared|score|classifier|decoder|predictions)([._]|$)"
)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def inspect(folder: pathlib.Path, name: str, template_date: str) -> ModelFacts:
    """The facts of a model payload; Fault REJECTED naming what is wrong with it."""
    rules.choose(name, sorted(p.name for p in folder.iterdir()))
    config = read_object(folder / "config.json")
    architecture, family = identity(name, config)
    tensors = read_model_headers(folder)
    check_weights(folder, name, tensors)
    linear = {n: t for n, t in tensors.items() if is_linear(n, t)}
    if not linear:
        raise rejected(name, "has no linear weights that LoRA could target")
    tokenizer = read_object(folder / "tokenizer.json", TOKENIZER_BYTES)
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = template_of(folder, settings)
    return ModelFacts(
        architecture=architecture,
        family=family,
        parameters=sum(t.count for t in tensors.values()),
        nf4_bytes=nf4_bytes(tensors),
        context_tokens=positive(name, config, _CONTEXT),
        vocabulary=positive(name, config, ("vocab_size",)),
        target_modules=tuple(sorted({n.removesuffix(".weight").rsplit(".", 1)[-1] for n in linear})),
        tokenizer_digest="sha256:" + artifacts.sha256_file(folder / "tokenizer.json"),
        template_digest="sha256:" + hashlib.sha256(template.encode()).hexdigest() if template else "",
        template_has_generation_marks=bool(_GENERATION.search(template)),
        template_date=template_date,
        eos_token_ids=end_tokens(folder, name, config, settings, tokenizer),
    )


def identity(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Architecture and family; refuses code, quantised weights and families nobody here knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    remote = [key for key in ("auto_map", "custom_pipelines", "trust_remote_code") if config.get(key)]
    if remote:
        raise rejected(name, f"config.json has {remote[0]!r}, which asks for remote code; accepted: models without it")
    if config.get("quantization_config"):
        raise rejected(name, "is quantised already (quantization_config); accepted: plain weights")
    told = config.get("architectures")
    if not (isinstance(told, list) and len(told) == 1 and isinstance(told[0], str)):
        raise rejected(name, "config.json does not name one architecture")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING_NAMES:
        raise rejected(name, f"config.json has model_type {str(family)[:60]!r}, which transformers here does not know")
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


def is_linear(name: str, tensor: TensorInfo) -> bool:
    """Whether LoRA can target the module that this weight belongs to."""
    return name.endswith(".weight") and len(tensor.shape) == 2 and not _NOT_LINEAR.search(name)


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


def template_of(folder: pathlib.Path, settings: Mapping[str, Any]) -> str:
    """The chat template's text, empty if there is none; the file wins over the setting, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.exists():
        if path.stat().st_size > 1 << 20:
            raise rejected(path.name, "is longer than 1 MiB")
        return path.read_text(encoding="utf-8", errors="strict")
    told = settings.get("chat_template")
    if isinstance(told, list):
        named = {str(t.get("name")): t.get("template") for t in told if isinstance(t, dict)}
        told = named.get("default")
    return told if isinstance(told, str) else ""


def end_tokens(
    folder: pathlib.Path,
    name: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> tuple[int, ...]:
    """Tokens that end generation: of generation_config.json, else of config.json, else the tokenizer's own."""
    path = folder / "generation_config.json"
    for source in (read_object(path) if path.exists() else {}, config):
        told = source.get("eos_token_id")
        ids = told if isinstance(told, list) else [] if told is None else [told]
        if ids:
            if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                raise rejected(name, f"eos_token_id is {str(told)[:60]}; accepted: token ids")
            return tuple(sorted(set(ids)))
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = tokenizer.get("added_tokens")
    found = [t.get("id") for t in added if isinstance(t, dict) and t.get("content") == text] if added else []
    if not found or type(found[0]) is not int:
        raise rejected(name, "names no token that ends generation (eos_token_id)")
    return (found[0],)
