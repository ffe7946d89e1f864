"""Adapters beside one base: every token gets the change of its own adapter.

Law of this room: the base's weights are never touched. A site is one linear module, or several that
read the same input. For rows with one new token the A and B of all their adapters stand side by side,
and what a row's own adapter does not make is set to zero between A and B, so no row is coloured by
another; a row with many new tokens has its own adapter alone. DoRA (see common/worker/dora) needs
gain * (W x + BA x): the gain is in B, and gain - 1 times what the base's weight made of x comes on top.

An adapter is held on the host, and on the device from the first forward that needs it; there those used
longest ago make room. On a processor both are the same tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from services.common.errors import rejected
from services.common.worker import dora
from services.common.worker.adapter import MAGNITUDE, WEIGHTS
from services.inference.worker.flat import Flat

_SPARE = 32
"""Ranks of adapters that have left which may stay in a stack, beyond a quarter: it is not made anew for each."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter at one module; scaling and gain are in `b`."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    more: torch.Tensor | None = None  # [out], gain - 1, fp32

    def to(self, device: torch.device) -> _Part:
        more = None if self.more is None else self.more.to(device)
        return _Part(self.a.to(device), self.b.to(device), more)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.more is None else self.more.nbytes)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Several adapters side by side at one site."""

    whose: tuple[str, ...]
    a: torch.Tensor | None
    """[all ranks of all modules, in]; None where none of them changes this site."""
    parts: tuple[tuple[int, int, int, int, torch.Tensor], ...]
    """Of each module that is changed: ranks from, to, outputs from, to, and B [outputs, ranks]."""
    columns: tuple[str, ...]
    """Whose each rank is."""
    has_more: bool


@dataclass(slots=True)
class Site:
    """One linear module, or several with the same input whose outputs stand side by side."""

    names: tuple[str, ...]
    outs: tuple[int, ...]
    biases: tuple[torch.Tensor | None, ...]
    stack: _Stack | None = None

    def starts(self) -> list[int]:
        """Where each module's outputs begin."""
        return [sum(self.outs[:n]) for n in range(len(self.outs))]


@dataclass(slots=True)
class _Held:
    """An adapter's parts by module."""

    host: dict[str, _Part]
    device: dict[str, _Part] | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.host.values())


@dataclass(slots=True)
class _Choice:
    """Who is in the forward that comes."""

    flat: Flat | None = None
    rows: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    """Adapters side by side; may hold some that no row has."""
    only: str = ""
    """The adapter that all rows have, where there is but one."""
    masks: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)


class Lora:
    """The adapters of one model. Not for training; dropout is left out as in eval mode."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device_bytes: int = 0) -> None:
        """`device_bytes` bounds the adapters on the device; 0 = nothing does."""
        self._modules = dict(model.named_modules())
        self._dtype = dtype
        self._device = next(model.parameters()).device
        self._device_bytes = device_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()
        """Those used longest ago first."""
        self._sites: list[Site] = []
        self._choice = _Choice()

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    @property
    def on_device(self) -> list[str]:
        """Digests of adapters that the device holds."""
        return [digest for digest, held in self._held.items() if held.device is not None]

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter's tensors on the host."""
        return self._held[digest].nbytes

    def site(self, *names: str) -> Site:
        """A site of the model; made once for each place that adds to it."""
        modules = [self._modules[name] for name in names]
        site = Site(names, tuple(m.out_features for m in modules), tuple(m.bias for m in modules))
        self._sites.append(site)
        return site

    def hook(self) -> None:
        """Makes every linear module a site that adds to itself, for models that run their own code."""
        for name, module in self._modules.items():
            if name and hasattr(module, "in_features") and hasattr(module, "out_features"):
                module.register_forward_hook(self._adder(self.site(name)))

    def forget_sites(self) -> None:
        """Before another way to compute the model makes its own."""
        self._sites.clear()

    # taking in and letting go

    def gains(self, tensors: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
        """What DoRA multiplies each module's outputs by; nothing for LoRA. Reads weights only: any thread."""
        found = {}
        for name, magnitude in tensors.items():
            if not name.endswith(f".{MAGNITUDE}"):
                continue
            key = name.removesuffix(MAGNITUDE)
            module = key.removeprefix("base_model.model.").rstrip(".")
            weight = dora.plain_weight(self._modules[module])
            a, b = (tensors[f"{key}lora_{part}.weight"].to(weight.device) for part in "AB")
            found[module] = magnitude.to(weight.device, torch.float32) / dora.sizes(weight, a, b, scaling)
            if not torch.isfinite(found[module]).all():
                raise rejected(WEIGHTS, f"check 'values': {name!r} divided by the size of its weights is not finite")
        return found

    def add(
        self, digest: str, tensors: Mapping[str, torch.Tensor], scaling: float, gains: Mapping[str, torch.Tensor]
    ) -> int:
        """Takes an adapter's checked tensors ("base_model.model.MODULE.lora_A.weight"); returns the bytes held."""
        host = {}
        for name, tensor_a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace(".lora_A.", ".lora_B.")].float()
            gain = gains[module].cpu() if module in gains else None
            b = b * scaling if gain is None else b * scaling * gain[:, None]
            more = None if gain is None else gain - 1
            host[module] = _Part(tensor_a.to(self._dtype).contiguous(), b.to(self._dtype).contiguous(), more)
        self._held[digest] = _Held(host)
        return self._held[digest].nbytes

    def remove(self, digest: str) -> int:
        """Frees an adapter that no row uses; returns the bytes of its tensors."""
        freed = self._held.pop(digest).nbytes
        self._unstack(digest)
        return freed

    def choose(self, flat: Flat | None) -> None:
        """Says which adapters the next forward has; None = the base alone."""
        rows = flat.adapters if flat is not None else ()
        needed = {a for a in rows if a} | {a for _, _, a in flat.pieces if a} if flat is not None else set()
        for digest in sorted(needed):
            self._bring(digest, needed)
        active = {a for a in rows if a}
        before = self._choice
        if rows != before.rows:
            only = next(iter(active)) if len(active) == 1 and "" not in rows else ""
            self._choice = _Choice(flat, rows, self._side_by_side(before.stacked, active), only)
        before.flat = self._choice.flat = flat

    def _side_by_side(self, before: tuple[str, ...], active: set[str]) -> tuple[str, ...]:
        """Who stands in the stacks: whoever is there already, unless that is too many."""
        there = tuple(d for d in before if d in self._held and self._held[d].device is not None)
        kept = (*there, *sorted(active - set(there)))
        wanted = sum(self._rank(d) for d in active)
        if there == before[: len(there)] and sum(map(self._rank, kept)) <= wanted + wanted // 4 + _SPARE:
            return kept if active else before
        return tuple(sorted(active))

    def _rank(self, digest: str) -> int:
        return next(iter(self._held[digest].host.values())).a.shape[0]

    def _bring(self, digest: str, needed: set[str]) -> None:
        """To the device; those used longest ago, and not needed now, make room."""
        held = self._held[digest]
        self._held.move_to_end(digest)
        if held.device is None:
            held.device = {name: part.to(self._device) for name, part in held.host.items()}
        if not self._device_bytes:
            return
        there = [d for d in self._held if self._held[d].device is not None]
        over = sum(self._held[d].nbytes for d in there) - self._device_bytes
        for other in there:
            if over > 0 and other not in needed:
                over -= self._held[other].nbytes
                self._held[other].device = None
                self._unstack(other)

    def _unstack(self, digest: str) -> None:
        self._choice = _Choice()
        for site in self._sites:
            if site.stack is not None and digest in site.stack.whose:
                site.stack = None

    # adding

    def add_to(self, site: Site, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to `out` [tokens, all outputs] of a site what the tokens' adapters make of `x` [tokens, in]."""
        choice = self._choice
        flat = choice.flat
        if flat is None:
            return
        rows = len(choice.rows)
        if choice.only:
            self._one(site, choice.only, x[:rows], out[:rows])
        elif rows and choice.stacked:
            self._several(site, choice, x[:rows], out[:rows])
        for begin, end, digest in flat.pieces:
            if digest:
                self._one(site, digest, x[begin:end], out[begin:end])

    def _one(self, site: Site, digest: str, x: torch.Tensor, out: torch.Tensor) -> None:
        parts = self._held[digest].device or {}
        x = x.to(self._dtype)
        for start, width, name, bias in zip(site.starts(), site.outs, site.names, site.biases, strict=True):
            part = parts.get(name)
            if part is None:
                continue
            own = out[:, start : start + width]
            delta = functional.linear(functional.linear(x, part.a), part.b)
            if part.more is not None:
                made = own if bias is None else own - bias
                delta = delta + part.more * made
            own += delta

    def _several(self, site: Site, choice: _Choice, x: torch.Tensor, out: torch.Tensor) -> None:
        stack = site.stack
        if stack is None or stack.whose != choice.stacked:
            stack = site.stack = self._stacked(site, choice.stacked)
        if stack.a is None:
            return
        inner = functional.linear(x.to(self._dtype), stack.a)
        inner.masked_fill_(self._foreign(choice, stack.columns, inner), 0.0)
        more = self._more(site, choice, out) if stack.has_more else None
        for low, high, start, end, b in stack.parts:
            own = out[:, start:end]
            own += functional.linear(inner[:, low:high], b)
        if more is not None:
            out += more

    def _stacked(self, site: Site, whose: tuple[str, ...]) -> _Stack:
        a, parts, columns = [], [], []
        has_more = False
        for start, width, name in zip(site.starts(), site.outs, site.names, strict=True):
            there = [(d, part) for d in whose if (part := (self._held[d].device or {}).get(name)) is not None]
            if not there:
                continue
            low = len(columns)
            for digest, part in there:
                a.append(part.a)
                columns.extend([digest] * part.a.shape[0])
                has_more = has_more or part.more is not None
            b = torch.cat([part.b for _, part in there], dim=1)
            parts.append((low, len(columns), start, start + width, b))
        return _Stack(whose, torch.cat(a) if a else None, tuple(parts), tuple(columns), has_more)

    def _more(self, site: Site, choice: _Choice, out: torch.Tensor) -> torch.Tensor:
        """What DoRA adds of the base's own outputs, of each row."""
        added = torch.zeros_like(out)
        for row, digest in enumerate(choice.rows):
            parts = (self._held[digest].device or {}) if digest else {}
            for start, width, name, bias in zip(site.starts(), site.outs, site.names, site.biases, strict=True):
                part = parts.get(name)
                if part is not None and part.more is not None:
                    own = out[row, start : start + width]
                    added[row, start : start + width] = part.more * (own if bias is None else own - bias)
        return added

    @staticmethod
    def _foreign(choice: _Choice, columns: tuple[str, ...], like: torch.Tensor) -> torch.Tensor:
        """[rows, ranks]: whether a rank is made by another adapter than the row's own."""
        if columns not in choice.masks:
            number = {digest: n for n, digest in enumerate(dict.fromkeys(columns))}
            whose = torch.tensor([number[c] for c in columns], device=like.device)
            rows = torch.tensor([number.get(row, -1) for row in choice.rows], device=like.device)
            choice.masks[columns] = rows[:, None] != whose[None, :]
        return choice.masks[columns]

    def _adder(self, site: Site):
        def add(module, inputs, output):
            if self._choice.flat is not None:
                width = output.shape[-1]
                self.add_to(site, inputs[0].reshape(-1, inputs[0].shape[-1]), output.view(-1, width))
            return output

        return add
