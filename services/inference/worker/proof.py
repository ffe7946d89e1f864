"""Load proves itself: a base and an adapter answer for what they will do.

Law of this room: every check is named in the refusal; what fails here was never
visible to a request.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qlorad.v1 import artifacts_pb2
from services.common import facts
from services.common.errors import Fault, rejected
from services.common.prompt import formats, golden
from services.common.prompt.render import Renderer
from services.common.safetensors_header import TensorInfo
from services.common.worker import adapter as files
from services.inference.worker.cache import SlotCache
from services.inference.worker.lora import Lora

_PROBE_TOKENS = 24
# How far the slot cache may be from the model's own forward, as a part of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter read and checked, but for its effect."""

    digest: str
    name: str
    tensors: dict[str, torch.Tensor]
    rank: int
    scaling: float
    renderer: Renderer
    """How its conversations are rendered: the base's template, or the prompt format it was trained with."""
    gains: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of DoRA: what each module's outputs are multiplied by."""


def prepare(
    name: str,
    payload: pathlib.Path,
    manifest: artifacts_pb2.Manifest,
    base: pathlib.Path,
    headers: dict[str, TensorInfo],
    renderers: Callable[[formats.Format], Renderer],
) -> Prepared:
    """Reads an adapter and checks keys, shapes, values and golden renderings; REJECTED names the check.

    Touches no model, so it may run beside the engine's loop.
    """
    told = facts.from_manifest(facts.AdapterFacts, manifest)
    config = _named("keys", name, lambda: files.check_adapter(payload, headers))
    renderer = _named("prompt format", name, lambda: renderers(formats.by_name(told.prompt_format)))
    _named("golden renderings", name, lambda: golden.check(renderer, told.golden))
    tensors = files.read_tensors(payload)
    wrong = files.first_fault(tensors, base)
    if wrong:
        raise rejected(name, f"check 'effect': {wrong}" if "effect" in wrong else f"check 'values': {wrong}")
    return Prepared(manifest.digest, name, tensors, int(config["r"]), files.scaling(config), renderer)


def _named(check: str, name: str, work):
    try:
        return work()
    except Fault as fault:
        raise rejected(name, f"check '{check}': {fault.message}") from None


class Probe:
    """A fixed input and what the base says to it."""

    def __init__(self, model, vocabulary: int) -> None:
        self._model = model
        device = model.get_input_embeddings().weight.device
        ids = [(7919 * n + 13) % vocabulary for n in range(_PROBE_TOKENS)]
        self.ids = torch.tensor([ids], dtype=torch.long, device=device)
        self._base = self._logits()

    def _logits(self) -> torch.Tensor:
        return self._model(input_ids=self.ids, use_cache=False).logits[0].float()

    def effect(self, lora: Lora, digest: str, name: str) -> float:
        """Largest change of a logit by an adapter; REJECTED if there is none, or if it is not finite."""
        lora.choose((digest,))
        try:
            change = float((self._logits() - self._base).abs().max())
        finally:
            lora.choose(())
        if change == 0.0 or not torch.isfinite(torch.tensor(change)):
            raise rejected(name, f"check 'effect': it changes the logits of a probe by {change:g}")
        return change

    def check_cache(self, name: str, context_tokens: int) -> None:
        """REJECTED unless reading in pieces through the slot cache gives what the model's own forward gives."""
        if not torch.isfinite(self._base).all():
            raise rejected(name, "check 'values': its logits are not finite")
        cache = SlotCache(4, context_tokens, self.ids.device)
        seen = []
        # Two rows of slots, pieces of many tokens, then one by one: every way the scheduler uses it.
        for begin, end in ((0, 10), (10, 20), *((n, n + 1) for n in range(20, _PROBE_TOKENS))):
            positions, mask = cache.open(1, [begin], end - begin)
            out = self._model(
                input_ids=self.ids[:, begin:end],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            seen.append(out.logits[0].float())
        apart = float((torch.cat(seen) - self._base).abs().max())
        largest = max(1.0, float(self._base.abs().max()))
        dtype = self._model.dtype if self._model.dtype in _TOLERANCE else torch.bfloat16
        if not apart <= _TOLERANCE[dtype] * largest:
            raise rejected(name, f"check 'cache': this engine's logits are off by {apart:g} of {largest:g}")
