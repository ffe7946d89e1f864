"""Adapters as files: written canonically, read strictly.

Law of this room: what is sealed here loads in plain peft and in the engine. The
configuration is rewritten so that equal adapters have equal bytes (peft writes
a set's order and the model's path); tensors must fit the base key by key.
"""

from __future__ import annotations

import json
import math
import pathlib
import re

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from services.common.errors import rejected
from services.common.safetensors_header import TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
_PARTS = ("lora_A.weight", "lora_B.weight")
_KEY = re.compile(rf"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB]\.weight|{MAGNITUDE})")
_NEAR = 0.02
"""How far, relatively, magnitudes are from those of the base because that was quantised when they were taken."""
# What would change the meaning of the tensors; anything but these values is refused.
_PLAIN: dict[str, object] = {
    "bias": "none", "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": False, "layers_to_transform": None,
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
    "exclude_modules": None, "alora_invocation_tokens": None,
}  # fmt: skip


def canonical_config(
    rank: int, alpha: float, dropout: float, target_modules: list[str], rslora: bool, dora: bool
) -> bytes:
    """adapter_config.json of a LoRA or DoRA adapter, the same bytes for the same adapter."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": dora,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def plain_name(name: str) -> str:
    """The name that peft saves a parameter of a wrapped model by."""
    name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    return name.replace(f".{MAGNITUDE}.default.weight", f".{MAGNITUDE}")


def is_trained(name: str) -> bool:
    """Whether a parameter of a wrapped model, or a tensor of a file, belongs to the adapter."""
    return ".lora_A." in name or ".lora_B." in name or f".{MAGNITUDE}" in name


def lora_tensors(model) -> dict[str, torch.Tensor]:
    """The adapter's tensors of a peft model under the names that peft saves them by, fp32, on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        if is_trained(name):
            found[plain_name(name)] = parameter.detach().to("cpu", torch.float32).contiguous()
    return dict(sorted(found.items()))


def save_adapter(model, folder: pathlib.Path) -> None:
    """Writes a peft model's adapter into a folder, canonically."""
    folder.mkdir(parents=True, exist_ok=True)
    c = model.peft_config["default"]
    targets = list(c.target_modules)
    save_tensors(folder, lora_tensors(model), c.r, c.lora_alpha, c.lora_dropout, targets, c.use_rslora)


def save_tensors(
    folder: pathlib.Path,
    tensors: dict[str, torch.Tensor],
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    rslora: bool,
) -> None:
    """Writes an adapter from its parts; `targets` are reduced to the short names that occur in the tensors.

    It is DoRA if there are magnitudes.
    """
    short = sorted({match["module"].rsplit(".", 1)[1] for match in map(_KEY.fullmatch, tensors) if match})
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    dora = any(name.endswith(MAGNITUDE) for name in tensors)
    (folder / CONFIG).write_bytes(canonical_config(rank, alpha, dropout, short or sorted(targets), rslora, dora))


def read_config(folder: pathlib.Path) -> dict:
    """adapter_config.json of a folder; REJECTED if it is not that of LoRA or DoRA."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise rejected(CONFIG, "is missing") from None
    except (ValueError, RecursionError):
        raise rejected(CONFIG, "is not JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise rejected(
            CONFIG, f"peft_type is {config.get('peft_type') if isinstance(config, dict) else None!r}; accepted: 'LORA'"
        )
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None, [], {}, False):
            raise rejected(CONFIG, f"{key} is {config[key]!r}; accepted: {plain!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= 512:
        raise rejected(CONFIG, f"r is {rank!r}; accepted: 1 to 512")
    if not isinstance(alpha, (int, float)) or not alpha > 0:
        raise rejected(CONFIG, f"lora_alpha is {alpha!r}; accepted: a number above 0")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key), bool | None):
            raise rejected(CONFIG, f"{key} is {config[key]!r}; accepted: true or false")
    return config


def scaling(config: dict) -> float:
    """What a checked adapter's update is multiplied by."""
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_adapter(folder: pathlib.Path, base: dict[str, TensorInfo]) -> dict:
    """The configuration of an adapter whose every tensor fits the base; else REJECTED naming the first that does not.

    `base` are the headers of the base's files. Says nothing of values: see `is_effectless`.
    """
    config = read_config(folder)
    extra = sorted(p.name for p in folder.iterdir() if p.name not in (CONFIG, WEIGHTS))
    if extra:
        raise rejected(extra[0][:80], f"is no file of an adapter; accepted: {CONFIG}, {WEIGHTS}")
    if not (folder / WEIGHTS).exists():
        raise rejected(WEIGHTS, "is missing")
    tensors = read_header(folder / WEIGHTS)
    if not tensors:
        raise rejected(WEIGHTS, "holds no tensors")
    rank = config["r"]
    wanted = {*_PARTS, MAGNITUDE} if config.get("use_dora") else set(_PARTS)
    parts: dict[str, set[str]] = {}
    for name, info in tensors.items():
        match = _KEY.fullmatch(name)
        weight = base.get(f"{match['module']}.weight") if match else None
        if match is None or weight is None or len(weight.shape) != 2:
            raise rejected(WEIGHTS, f"tensor {name[:120]!r} belongs to no linear module of the base")
        out_features, in_features = weight.shape
        if match["part"] not in wanted:
            raise rejected(WEIGHTS, f"tensor {name!r} is a magnitude of DoRA, but {CONFIG} does not say use_dora")
        shapes = zip((*_PARTS, MAGNITUDE), ((rank, in_features), (out_features, rank), (out_features,)), strict=True)
        expected = dict(shapes)[match["part"]]
        if info.shape != expected:
            raise rejected(WEIGHTS, f"tensor {name!r} has shape {info.shape}; the base and r={rank} need {expected}")
        if info.dtype not in ("F32", "F16", "BF16"):
            raise rejected(WEIGHTS, f"tensor {name!r} has type {info.dtype}; accepted: F32, F16, BF16")
        parts.setdefault(match["module"], set()).add(match["part"])
    for module, have in sorted(parts.items()):
        if have != wanted:
            raise rejected(WEIGHTS, f"tensor '{_PREFIX}{module}.{min(wanted - have)}' is missing")
    return config


def module_names(tensors) -> list[str]:
    """Full names of the modules that the tensors change, as the base calls them."""
    return sorted({match["module"] for match in map(_KEY.fullmatch, tensors) if match})


def read_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a checked adapter."""
    # Not load_file: that keeps some bytes for each tensor ever read, which a server that loads for months would feel.
    return load((folder / WEIGHTS).read_bytes())


def first_fault(tensors: dict[str, torch.Tensor], base: pathlib.Path) -> str:
    """Why the values cannot be used: not finite, or without any effect; empty if they can.

    `base` is the payload of the base; it is read only where magnitudes alone could have an effect.
    """
    for name, tensor in sorted(tensors.items()):
        if not torch.isfinite(tensor).all():
            return f"tensor {name!r} holds values that are not finite"
    turned = any(
        bool(tensor.any()) and bool(tensors[name.replace(".lora_B.", ".lora_A.")].any())
        for name, tensor in tensors.items()
        if ".lora_B." in name
    )
    magnitudes = {name.removesuffix(f".{MAGNITUDE}"): t for name, t in tensors.items() if name.endswith(MAGNITUDE)}
    if turned or any(_grown(m, _row_sizes(base, name.removeprefix(_PREFIX))) for name, m in magnitudes.items()):
        return ""
    own = f", and every magnitude is the base's own within {_NEAR:.0%}" if magnitudes else ""
    return f"has no effect: every lora_B or its lora_A is zero{own}"


def _grown(magnitude: torch.Tensor, own: torch.Tensor) -> bool:
    return bool(((magnitude.float() - own).abs() > _NEAR * own).any())


def _row_sizes(base: pathlib.Path, module: str) -> torch.Tensor:
    """How large each output's weights are in the files of a base that has the module."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            if f"{module}.weight" in f.keys():
                return torch.linalg.vector_norm(f.get_tensor(f"{module}.weight").float(), dim=1)
    raise rejected(WEIGHTS, f"the base has no {module}.weight")
