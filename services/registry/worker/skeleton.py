"""Whether a folder's weights are all that its architecture needs.

Law of this room: a weight that is missing would be drawn at random by the
loader, with a warning that nobody reads; so it is found here, on a model
without memory behind it.
"""

import pathlib
import warnings
from collections.abc import Mapping

import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from services.common.errors import rejected, show
from services.common.safetensors_header import TensorInfo


def check(folder: pathlib.Path, name: str, architecture: str, family: str, tensors: Mapping[str, TensorInfo]) -> None:
    """REJECTED naming the first weight that is missing or of another shape.

    Does not look at families whose files transformers rewrites while loading
    (most mixtures of experts): their names cannot be compared.
    """
    kind = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise rejected(
            name, f"config.json has architecture {show(architecture)}, which transformers here does not know"
        )
    if get_checkpoint_conversion_mapping(family) or get_checkpoint_conversion_mapping(architecture):
        return
    model = _without_memory(folder, name, kind, tensors)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    there = {_modern(n): t for n, t in tensors.items()}
    for key, expected in sorted(model.state_dict().items()):
        found = there.get(key)
        if found is None and key not in tied:
            raise rejected(name, f"lacks the weight {key!r}, which {architecture} needs")
        if found is not None and found.shape != tuple(expected.shape):
            raise rejected(
                name, f"weight {key!r} has shape {found.shape}; config.json asks for {tuple(expected.shape)}"
            )


def _without_memory(folder: pathlib.Path, name: str, kind: type, tensors: Mapping[str, TensorInfo]):
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 0)
        if not isinstance(layers, int) or layers > len(tensors):
            raise ValueError(f"num_hidden_layers is {show(layers)} where there are {len(tensors)} tensors")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(config)
    except Exception as e:  # whatever a stranger's config makes the library do
        raise rejected(name, f"config.json makes no model: {type(e).__name__}: {show(str(e), 200)}") from None


def _modern(name: str) -> str:
    """A weight's name as today's transformers calls it; old BERT files say gamma and beta."""
    if name.endswith(".gamma"):
        return name.removesuffix(".gamma") + ".weight"
    return name.removesuffix(".beta") + ".bias" if name.endswith(".beta") else name
