"""Load proves itself: a base and an adapter answer for what they will do.

Law of this room: every check is named in the refusal; what fails here was never
visible to a request.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from qlorad.v1 import artifacts_pb2
from services.common import facts
from services.common.errors import Fault, rejected
from services.common.prompt import formats, golden
from services.common.prompt.render import Renderer
from services.common.safetensors_header import TensorInfo
from services.common.worker import adapter as files
from services.inference.worker import flat
from services.inference.worker.forward import Forward
from services.inference.worker.lanes import Lanes, Place
from services.inference.worker.lora import Lora
from services.inference.worker.said import TOKENS, Said, ids

# How far a forward of ours may be from the model's own, as a part of the largest logit.
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
    """A fixed input and what the model's own code says to it: what every forward of ours is held against."""

    def __init__(self, model, said: Said, vocabulary: int, name: str) -> None:
        self._name = name
        self._device = model.get_input_embeddings().weight.device
        self._ids = ids(vocabulary)
        self._own, self.dtype = said.logits, model.dtype
        self._forward: Forward
        # Places of its own, so that a probe never waits for room that requests have.
        self._lanes = Lanes(said.shapes, self.dtype, self._device, 0)
        self._base: torch.Tensor

    def proven(self, forwards: Iterable[Forward]) -> Forward:
        """The first of these that gives what the model's own code gives; REJECTED if none does."""
        told = []
        for forward in forwards:
            self._forward = forward
            try:
                apart, largest = self._apart()
            except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                told.append(f"{type(forward).__name__}: {error}")
                continue
            if apart <= _TOLERANCE[self.dtype if self.dtype in _TOLERANCE else torch.bfloat16] * largest:
                self._base = self._logits("", None)
                return forward
            told.append(f"{type(forward).__name__}: logits are off by {apart:g} of {largest:g}")
        raise rejected(self._name, f"check 'forward': this engine does not compute it right ({'; '.join(told)})")

    def effect(self, lora: Lora, digest: str, name: str) -> float:
        """Largest change of a logit by an adapter; REJECTED if there is none, or if it is not finite."""
        change = float((self._logits(digest, lora) - self._base).abs().max())
        if change == 0.0 or not torch.isfinite(torch.tensor(change)):
            raise rejected(name, f"check 'effect': it changes the logits of a probe by {change:g}")
        return change

    def _logits(self, digest: str, lora: Lora | None) -> torch.Tensor:
        place = self._place()
        try:
            laid = flat.lay([flat.Piece(place, self._ids, digest, TOKENS)], self._device)
            if lora is not None:
                lora.choose(laid)
            return self._forward(laid)
        finally:
            if lora is not None:
                lora.choose(None)
            self._lanes.give(place)

    def _apart(self) -> tuple[float, float]:
        """How far reading in pieces, beside another row, is from the model's own; and the largest logit."""
        mine, other = self._place(), self._place()
        try:
            return self._beside(mine, other)
        finally:
            self._lanes.give(mine)
            self._lanes.give(other)

    def _place(self) -> Place:
        place = self._lanes.take(TOKENS)
        if place is None:
            raise MemoryError("no room for a probe's keys and values")
        return place

    def _beside(self, mine: Place, other: Place) -> tuple[float, float]:
        seen = []
        # Pieces of many tokens, then one by one, and another row that is shorter: every way the scheduler uses it.
        for begin, end in ((0, 10), (10, 20), *((n, n + 1) for n in range(20, TOKENS))):
            pieces = [
                flat.Piece(other, self._ids[begin : begin + 1], ""),
                flat.Piece(mine, self._ids[begin:end], "", end - begin),
            ]
            laid = flat.lay(pieces, self._device)
            logits = self._forward(laid)
            flat.settle(pieces)
            seen.append(logits[[at for at, number in enumerate(laid.order) if number == 1]])
        return float((torch.cat(seen) - self._own).abs().max()), max(1.0, float(self._own.abs().max()))
