"""Adapters beside one base: every token gets the change of its own adapter.

Law of this room: the base's weights are never touched. A site is one linear module, or several that
read the same input. Tokens of all rows share the stack of their adapters (see stacks), where what is not a
token's own is set to zero between A and B, so no row is coloured by another; only a prompt so long that this
costs more than a product of its own has its adapter alone. A few tokens on a processor go by a compiled part that
reads each adapter where it lies (see each). DoRA (see common/worker/dora) needs
gain * (W x + BA x): the gain is in B, and gain - 1 times what the base's weight made of x comes on top.

An adapter is held on the host, and on the device from the first forward that needs it; there those used
longest ago make room. On a processor both are the same tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from services.common.errors import rejected
from services.common.worker import dora
from services.common.worker.adapter import MAGNITUDE, WEIGHTS
from services.inference.worker import each, stacks
from services.inference.worker import flat as forwards
from services.inference.worker.flat import Flat
from services.inference.worker.linears import Linear
from services.inference.worker.reordered import Weights
from services.inference.worker.sites import Choice, Site

_SHARED = 65_536
"""Tokens of a prompt times ranks of all adapters, up to which it shares the stack with the others."""
_SINGLES = 4
"""Adapters that read long prompts at the same time whose matrices of a site are kept."""
_SPARE = 32
"""Ranks of adapters that nobody has now which may stay when a stack is made anew, beyond a quarter."""
_PATIENCE = 16
"""Forwards that cost as much as the whole stack made anew: so much may be spent on ranks that nobody has."""


@dataclass(slots=True)
class _Held:
    """An adapter's parts by module."""

    host: dict[str, stacks.Part]
    device: dict[str, stacks.Part] | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.host.values())


class Lora:
    """The adapters of one model. Not for training; dropout is left out as in eval mode."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device_bytes: int = 0) -> None:
        """`device_bytes` bounds the adapters on the device; 0 = nothing does."""
        self._model = model
        self._modules = dict(model.named_modules())
        self._dtype = dtype
        self._device = next(model.parameters()).device
        self._device_bytes = device_bytes
        self._each = each.found(self._device, dtype)
        self._held: OrderedDict[str, _Held] = OrderedDict()
        """Those used longest ago first."""
        self._sites: list[Site] = []
        self._choice = Choice()
        self._line: tuple[str, ...] = ()
        """Adapters that stand side by side in the stacks; may hold some that no token has."""
        self._number = 0
        """Of the line."""
        self._spent = 0
        """Ranks times forwards that the line held for nobody."""

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    @property
    def on_device(self) -> list[str]:
        """Digests of adapters that the device holds."""
        return [digest for digest, held in self._held.items() if held.device is not None]

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter's tensors on the host."""
        return self._held[digest].nbytes

    @property
    def is_chosen(self) -> bool:
        """Whether any token of the forward that comes has an adapter."""
        return self._choice.flat is not None and bool(self._choice.shared or self._choice.long)

    def site(self, *names: str, apart: bool = False) -> Site:
        """A site of the model; made once for each place that adds to it."""
        modules = [self._modules[name] for name in names]
        site = Site(names, tuple(m.out_features for m in modules), tuple(m.bias for m in modules), apart)
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
            if tensor_a.abs().max() > stacks.LARGEST:
                raise rejected(WEIGHTS, f"check 'values': {name!r} has numbers beyond {stacks.LARGEST:g}")
            b = tensors[name.replace(".lora_A.", ".lora_B.")].float()
            gain = gains[module].cpu() if module in gains else None
            b = b * scaling if gain is None else b * scaling * gain[:, None]
            more = None if gain is None else gain - 1
            # B lies in memory by ranks, which a few tokens read one after another.
            b = b.t().to(self._dtype).contiguous().t()
            host[module] = stacks.Part(tensor_a.to(self._dtype).contiguous(), b, more)
        self._held[digest] = _Held(host)
        return self._held[digest].nbytes

    def remove(self, digest: str) -> int:
        """Frees an adapter that no row uses; returns the bytes of its tensors."""
        freed = self._held.pop(digest).nbytes
        self._unstack(digest)
        return freed

    def choose(self, flat: Flat | None, soon: Iterable[str] = ()) -> None:
        """Says which adapters the next forward has; None = the base alone. `soon`: who is in forwards that follow."""
        if flat is None:
            self._choice.flat = None  # who stands in line stays: the next forward has most of them again
            return
        needed = {a for a in flat.adapters if a} | {a for _, _, a in flat.pieces if a}
        if needed and not self._device_bytes:
            needed |= {digest for digest in soon if digest}
        for digest in sorted(needed):
            self._bring(digest, needed)
        if needed:
            self._stand_in_line(needed)
        ranks = sum(map(self._rank, self._line))
        spans = tuple(piece for piece in flat.pieces if (piece[1] - piece[0]) * ranks <= _SHARED)
        long = tuple(piece for piece in flat.pieces[len(spans) :] if piece[2])
        shared = spans[-1][1] if spans else len(flat.adapters)
        if len(spans) == len(flat.pieces):
            shared = len(flat.ids)
        sharers = {*flat.adapters, *(digest for _, _, digest in spans)}
        if not any(sharers):
            shared = 0
        before = self._choice
        if (flat.adapters, spans, shared) != (before.rows, before.spans, before.shared):
            only = len(sharers) == 1 and len(self._line) == 1
            self._choice = Choice(None, flat.adapters, spans, shared, (), only)
            own = max((self._rank(digest) for digest in sharers if digest), default=0)
            if self._each is not None and shared and each.pays(shared, own, ranks):
                self._choice.turn = each.Turn(self._places())
        self._choice.long, self._choice.flat = long, flat

    def _stand_in_line(self, needed: set[str]) -> None:
        """Puts who is needed into the line of adapters that a stack is made of.

        Whoever stands there stays for a while: a stack made anew costs as much as many forwards.
        """
        wanted, there = sum(map(self._rank, needed)), sum(map(self._rank, self._line))
        if needed.issubset(self._line):
            self._spent += there - wanted
            if self._spent <= _PATIENCE * there:
                return
        kept: list[str] = []
        room = wanted // 4 + _SPARE if self._spent <= _PATIENCE * there else 0
        for digest in reversed(self._held):
            if digest in self._line and digest not in needed and (room := room - self._rank(digest)) >= 0:
                kept.append(digest)
        self._line_up(tuple(sorted({*needed, *kept})))

    def _line_up(self, line: tuple[str, ...]) -> None:
        if line != self._line:
            self._line, self._number = line, self._number + 1
            self._choice = Choice()
        self._spent = 0

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
        self._line_up(tuple(d for d in self._line if d != digest))
        for site in self._sites:
            site.forget(digest, self._number)

    # adding

    def through(self, site: Site, linear: Linear, x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        """What a site makes of `x` [tokens, in] with the tokens' adapters, added to `there` if that is given."""
        choice = self._choice
        if not self.is_chosen:
            return linear(x) if there is None else linear.onto(x, there)
        table = self._table_of(site, x)
        if table is not None and choice.turn is not None and not choice.long:  # most steps: little is asked for them
            out = linear(x) if there is None else linear.onto(x, there)
            table.add(choice.turn, x, out)
            return out
        table, stack, singles = self._adding(site, x)
        if any(one.has_more for one in (stack, *singles) if one is not None):
            # DoRA looks at what the base alone makes.
            out = self._with_more(site, linear(x), x, stack, singles)
            return out if there is None else there + out
        out = linear(x) if there is None else linear.onto(x, there)
        if table is not None and choice.turn is not None:
            table.add(choice.turn, x, out)
        elif stack is not None and stack.a is not None:
            shared = choice.shared
            inner = self._inner(stack, x if shared == len(x) else x[:shared])
            whole = stack.changes[0]
            if shared == len(x) and whole.end - whole.start == out.shape[-1]:
                return whole.b.onto(inner, out)
            stack.add(inner, out if shared == len(x) else out[:shared])
        self._add_singles(singles, x, out)
        return out

    def gated(self, site: Site, gate: Weights, up: Weights, x: torch.Tensor) -> torch.Tensor:
        """silu(gate x) * (up x) with the tokens' adapters at both; the two modules of the site stand apart."""
        if not self.is_chosen:
            return up.times(x, gate.opened(x))
        made, turn = [gate(x), up(x)], self._choice.turn
        table, stack, singles = self._adding(site, x)
        shared = self._choice.shared
        if table is not None and turn is not None and not singles and shared == len(x):
            return table.gate(turn, x, *made)
        if table is None and stack is not None and not singles and not stack.has_more and shared == len(x):
            inner = self._inner(stack, x) if stack.a is not None else x
            for change in stack.changes:
                number = site.starts().index(change.start)
                made[number] = change.b.onto(inner[:, change.low : change.high], made[number])
        else:
            out = torch.cat(made, -1)
            if table is not None and turn is not None:
                table.add(turn, x, out)
            made = list(self._with_more(site, out, x, stack, singles).split(site.outs, -1))
        return functional.silu(made[0]) * made[1]

    def add_to(self, site: Site, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to `out` [tokens, all outputs], which the base made of `x` [tokens, in]."""
        if not self.is_chosen:
            return
        table, stack, singles = self._adding(site, x, out)
        if table is not None and self._choice.turn is not None:
            table.add(self._choice.turn, x, out)
        self._with_more(site, out, x, stack, singles)

    def _adding(
        self, site: Site, *numbers: torch.Tensor
    ) -> tuple[each.Table | None, stacks.Stack | None, list[stacks.Stack]]:
        """What adds to the tokens that share a stack: a table that does without, or it; and what to long prompts."""
        singles = [self._single(site, digest) for _, _, digest in self._choice.long]
        table = self._table_of(site, *numbers)
        if table is not None:
            return table, None, singles
        return None, self._stack_of(site) if self._choice.shared else None, singles

    def _table_of(self, site: Site, *numbers: torch.Tensor) -> each.Table | None:
        """Where the adapters' matrices lie, if these numbers go by the compiled part."""
        if self._each is None or self._choice.turn is None or not all(map(each.reads, numbers)):
            return None
        if site.table_line != self._number:
            site.table = each.table(self._each, self._parts(self._line), site.names, site.outs)
            site.table_line = self._number
        return site.table

    def _with_more(
        self, site: Site, out: torch.Tensor, x: torch.Tensor, stack: stacks.Stack | None, singles: list[stacks.Stack]
    ) -> torch.Tensor:
        has_more = any(one.has_more for one in (stack, *singles) if one is not None)
        more = self._more(site, self._choice.whose(len(x)), out) if has_more else None
        if stack is not None and stack.a is not None:
            shared = self._choice.shared
            stack.add(self._inner(stack, x[:shared]), out[:shared])
        self._add_singles(singles, x, out)
        if more is not None:
            out += more
        return out

    def _add_singles(self, singles: list[stacks.Stack], x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to long prompts; a few tokens around each are computed too, since libraries dislike new lengths."""
        for (begin, end, _), one in zip(self._choice.long, singles, strict=True):
            if one.a is not None:
                low, high = forwards.around(begin, end, len(x))
                made = one.a(x[low:high].to(self._dtype))
                one.add(made, out[begin:end], begin - low)

    def _inner(self, stack: stacks.Stack, x: torch.Tensor) -> torch.Tensor:
        """What A makes of the tokens that share the stack, without what belongs to others."""
        assert stack.a is not None
        return stack.a.silenced(x.to(self._dtype), None if self._choice.only else self._silence(stack.columns, x))

    def _silence(self, columns: tuple[int, ...], like: torch.Tensor) -> stacks.Silence:
        silence = self._choice.silences.get(columns)
        if silence is None:
            places, owners = (torch.tensor(of, device=like.device) for of in (self._places(), columns))
            own = places[:, None] == owners[None]
            silence = self._choice.silences[columns] = stacks.Silence(own)
        return silence

    def _places(self) -> list[int]:
        """Where in line the adapter of each token stands that shares the stack; -1 where it has none."""
        place = {digest: n for n, digest in enumerate(self._line)}
        return [place.get(digest, -1) for digest in self._choice.whose(self._choice.shared)]

    def _stack_of(self, site: Site) -> stacks.Stack:
        if site.stack is None or site.line != self._number:
            site.stack, site.line = self._stacked(site, self._line), self._number
        return site.stack

    def _single(self, site: Site, digest: str) -> stacks.Stack:
        one = site.singles.get(digest)
        if one is None:
            while len(site.singles) >= _SINGLES:
                del site.singles[next(iter(site.singles))]
            one = site.singles[digest] = self._stacked(site, (digest,))
        return one

    def _stacked(self, site: Site, line: Sequence[str]) -> stacks.Stack:
        return stacks.stacked(self._parts(line), site.names, site.starts(), site.apart)

    def _parts(self, line: Sequence[str]) -> list[Mapping[str, stacks.Part]]:
        return [self._held[d].device or {} for d in line]

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

    def _adder(self, site: Site):
        def add(module, inputs, output):
            if self.is_chosen:
                width = output.shape[-1]
                self.add_to(site, inputs[0].reshape(-1, inputs[0].shape[-1]), output.view(-1, width))
            return output

        return add
