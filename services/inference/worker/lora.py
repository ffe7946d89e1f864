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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from services.common.errors import rejected
from services.common.worker import dora
from services.common.worker.adapter import MAGNITUDE, WEIGHTS
from services.inference.worker.flat import Flat
from services.inference.worker.linears import Linear
from services.inference.worker.reordered import Weights

_JOINED = 200_000
"""Numbers of a matrix that several modules become."""
_OFTEN = 8
"""Uses after which a matrix is reordered."""
_SINGLES = 4
"""Adapters that read prompts at the same time whose matrices of a site are kept."""
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


class _Matrix:
    """A matrix that is reordered once it has been used a few times: doing so costs as much as some uses."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._uses = 0
        self._quick: Weights | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._quick is not None:
            return self._quick(x)
        self._uses += 1
        if self._uses == _OFTEN and self._weight.dtype == torch.bfloat16 and self._weight.device.type == "cpu":
            self._quick = Weights(self._weight, None)
        return functional.linear(x, self._weight)

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`there` and the product; a new tensor."""
        return self._quick.onto(x, there) if self._quick is not None else there + self(x)


@dataclass(frozen=True, slots=True)
class _Change:
    """Modules of a site that lie side by side and are changed together."""

    low: int
    high: int
    """Ranks from, to."""
    start: int
    end: int
    """Outputs from, to."""
    b: _Matrix
    """[outputs, ranks]; of several modules, each has its own corner."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """Several adapters side by side at one site."""

    whose: tuple[str, ...]
    a: _Matrix | None
    """[all ranks of all modules, in]; None where none of them changes this site."""
    changes: tuple[_Change, ...]
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
    singles: dict[str, _Stack] = field(default_factory=dict)
    """Of adapters that read a prompt, a few."""

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
    some: bool = False
    """Whether any row has an adapter."""
    only: bool = False
    """Whether one adapter alone stands there, and every row has it."""
    masks: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)


class Lora:
    """The adapters of one model. Not for training; dropout is left out as in eval mode."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device_bytes: int = 0) -> None:
        """`device_bytes` bounds the adapters on the device; 0 = nothing does."""
        self._model = model
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
        last = self._model.get_output_embeddings()
        for name, module in self._modules.items():
            if module is not last and name and hasattr(module, "in_features") and hasattr(module, "out_features"):
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
        if digest in self._held:
            self._unstack(digest)
        known = {name for site in self._sites for name in site.names}
        host = {}
        for name, tensor_a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if known and module not in known:
                raise rejected(WEIGHTS, f"changes {module!r}, which this engine serves as the base has it")
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
        if flat is None:
            self._choice.flat = None  # who stands side by side stays: the next forward has most of them again
            return
        rows = flat.adapters
        needed = {a for a in rows if a} | {a for _, _, a in flat.pieces if a}
        for digest in sorted(needed):
            self._bring(digest, needed)
        active = {a for a in rows if a}
        before = self._choice
        if rows != before.rows:
            stacked = self._side_by_side(before.stacked, active)
            only = len(active) == 1 and "" not in rows and len(stacked) == 1
            self._choice = _Choice(flat, rows, stacked, bool(active), only)
        before.flat = self._choice.flat = flat

    def _side_by_side(self, before: tuple[str, ...], active: set[str]) -> tuple[str, ...]:
        """Who stands in the stacks: whoever is there already, unless that is too many."""
        there = tuple(d for d in before if d in self._held and self._held[d].device is not None)
        kept = (*there, *sorted(active - set(there)))
        wanted = sum(self._rank(d) for d in active)
        if there == before[: len(there)] and sum(map(self._rank, kept)) <= wanted + wanted // 4 + _SPARE:
            return kept
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
            site.singles.pop(digest, None)
            if site.stack is not None and digest in site.stack.whose:
                site.stack = None

    # adding

    def through(self, site: Site, linear: Linear, x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        """What a site makes of `x` [tokens, in] with the tokens' adapters, added to `there` if that is given."""
        flat = self._choice.flat
        if flat is None or not (self._choice.some or flat.pieces):
            return linear(x) if there is None else linear.onto(x, there)
        rows = len(self._choice.rows)
        stack = self._stack_of(site) if self._choice.some else None
        singles = [(b, e, self._single(site, digest)) for b, e, digest in flat.pieces if digest]
        if any(one.has_more for one in (stack, *(one for _, _, one in singles)) if one is not None):
            # DoRA looks at what the base alone makes.
            out = self._with_more(site, linear(x), x, stack, singles)
            return out if there is None else there + out
        out = linear(x) if there is None else linear.onto(x, there)
        if stack is not None and stack.a is not None:
            inner = self._inner(stack, x[:rows])
            whole = stack.changes[0]
            if rows == len(x) and whole.end - whole.start == out.shape[-1]:
                return whole.b.onto(inner, out)
            _add(stack, inner, out[:rows])
        for begin, end, one in singles:
            if one.a is not None:
                _add(one, one.a(x[begin:end].to(self._dtype)), out[begin:end])
        return out

    def add_to(self, site: Site, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to `out` [tokens, all outputs], which the base made of `x` [tokens, in]."""
        flat = self._choice.flat
        if flat is not None:
            stack = self._stack_of(site) if self._choice.some else None
            singles = [(b, e, self._single(site, digest)) for b, e, digest in flat.pieces if digest]
            self._with_more(site, out, x, stack, singles)

    def _with_more(
        self,
        site: Site,
        out: torch.Tensor,
        x: torch.Tensor,
        stack: _Stack | None,
        singles: list[tuple[int, int, _Stack]],
    ) -> torch.Tensor:
        rows = self._choice.rows
        if stack is not None and stack.a is not None:
            more = self._more(site, rows, out[: len(rows)]) if stack.has_more else None
            _add(stack, self._inner(stack, x[: len(rows)]), out[: len(rows)], more)
        for begin, end, one in singles:
            if one.a is not None:
                more = self._more(site, one.whose * (end - begin), out[begin:end]) if one.has_more else None
                _add(one, one.a(x[begin:end].to(self._dtype)), out[begin:end], more)
        return out

    def _inner(self, stack: _Stack, x: torch.Tensor) -> torch.Tensor:
        """What A makes of the rows, without what belongs to others."""
        assert stack.a is not None
        inner = stack.a(x.to(self._dtype))
        if not self._choice.only:
            inner.masked_fill_(self._foreign(self._choice, stack.columns, inner), 0.0)
        return inner

    def _stack_of(self, site: Site) -> _Stack:
        if site.stack is None or site.stack.whose != self._choice.stacked:
            site.stack = self._stacked(site, self._choice.stacked)
        return site.stack

    def _single(self, site: Site, digest: str) -> _Stack:
        one = site.singles.get(digest)
        if one is None:
            while len(site.singles) >= _SINGLES:
                del site.singles[next(iter(site.singles))]
            one = site.singles[digest] = self._stacked(site, (digest,))
        return one

    def _stacked(self, site: Site, whose: tuple[str, ...]) -> _Stack:
        a: list[torch.Tensor] = []
        corners: list[tuple[int, int, torch.Tensor]] = []
        columns: list[str] = []
        has_more = False
        for start, name in zip(site.starts(), site.names, strict=True):
            there = [(d, part) for d in whose if (part := (self._held[d].device or {}).get(name)) is not None]
            if not there:
                continue
            corners.append((len(columns), start, torch.cat([part.b for _, part in there], dim=1)))
            for digest, part in there:
                a.append(part.a)
                columns.extend([digest] * part.a.shape[0])
                has_more = has_more or part.more is not None
        first = _Matrix(torch.cat(a)) if a else None
        return _Stack(whose, first, tuple(_changes(corners)), tuple(columns), has_more)

    def _more(self, site: Site, whose: Sequence[str], out: torch.Tensor) -> torch.Tensor:
        """What DoRA adds of the base's own outputs, of each token."""
        added = torch.zeros_like(out, dtype=torch.float32)
        for digest in sorted({d for d in whose if d}):
            parts = self._held[digest].device or {}
            if not any(part is not None and part.more is not None for part in map(parts.get, site.names)):
                continue
            theirs = torch.tensor([row for row, d in enumerate(whose) if d == digest], device=out.device)
            for start, width, name, bias in zip(site.starts(), site.outs, site.names, site.biases, strict=True):
                part = parts.get(name)
                if part is not None and part.more is not None:
                    own = out[theirs, start : start + width]
                    added[theirs, start : start + width] = part.more * (own if bias is None else own - bias)
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


def _add(stack: _Stack, inner: torch.Tensor, out: torch.Tensor, more: torch.Tensor | None = None) -> None:
    """Adds what B makes of `inner`, and `more`."""
    for change in stack.changes:
        own = out[:, change.start : change.end]
        own += change.b(inner[:, change.low : change.high])
    if more is not None:
        out += more


def _changes(corners: list[tuple[int, int, torch.Tensor]]) -> Iterator[_Change]:
    """Small modules whose outputs follow one another become one matrix: one product costs less than two.

    Of large ones the empty corners would cost more than they save.
    """
    group: list[tuple[int, int, torch.Tensor]] = []
    for corner in (*corners, None):
        if group and (corner is None or not _joins(group, corner)):
            low, start = group[0][0], group[0][1]
            b = torch.block_diag(*(part for _, _, part in group)) if len(group) > 1 else group[0][2]
            yield _Change(low, low + b.shape[1], start, start + b.shape[0], _Matrix(b))
            group = []
        if corner is not None:
            group.append(corner)


def _joins(group: list[tuple[int, int, torch.Tensor]], corner: tuple[int, int, torch.Tensor]) -> bool:
    parts = [part for _, _, part in (*group, corner)]
    size = sum(part.shape[0] for part in parts) * sum(part.shape[1] for part in parts)
    return corner[1] == group[-1][1] + group[-1][2].shape[0] and size <= _JOINED
