"""Which files of a folder make a model.

Law of this room: pure; decides by names alone, so it decides before a byte is
read. Pickles and code are refused, not skipped: whoever put them there may
expect them to run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from services.common.errors import rejected

NEEDED: Final = ("config.json", "tokenizer.json")
TAKEN: Final = frozenset(
    {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    }
)  # fmt: skip
WEIGHTS: Final = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".msgpack")
CODE: Final = (".py", ".pyc", ".pyo", ".so", ".dll", ".dylib")
_ADAPTER: Final = ("adapter_model.safetensors", "adapter_config.json")


def choose(model: str, found: Iterable[str]) -> tuple[str, ...]:
    """The names to take, sorted; REJECTED naming every file that must not or must be there.

    Other files (a README, a licence, pictures) are left out. Looks only at the
    top of a folder.
    """
    names = sorted(found)
    wrong = []
    pickles = [n for n in names if n.lower().endswith(PICKLES)]
    if pickles:
        wrong.append(f"holds {', '.join(pickles)}, which may be pickle; accepted: weights as safetensors only")
    code = [n for n in names if n.lower().endswith(CODE)]
    if code:
        wrong.append(f"holds {', '.join(code)}; code of a model is never run; accepted: models without code")
    wrong += [f"lacks {n}" for n in NEEDED if n not in names]
    weights = [n for n in names if WEIGHTS.fullmatch(n) and n not in _ADAPTER]
    if not weights:
        wrong.append("lacks safetensors weights")
    if wrong:
        raise rejected(model, "; ".join(wrong))
    return tuple(sorted({n for n in names if n in TAKEN} | set(weights)))
