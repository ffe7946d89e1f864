"""What is resident and who answers: the table of one base and its adapters.

Law of this room: pure. Names were resolved to digests before they come here; a
table is never changed, a new one takes its place, so a request keeps what it
was promised.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2
from services.common.errors import Fault, rejected, wrong_state
from services.common.facts import ModelFacts
from services.common.names import short


@dataclass(frozen=True, slots=True)
class Table:
    """One base, its adapters, and the default. Says nothing of requests in flight."""

    model: inference_pb2.LoadedModel | None = None
    adapters: tuple[inference_pb2.LoadedAdapter, ...] = ()
    """Oldest first; `is_default` is filled only by `listed`."""
    default: str = ""
    """Digest that answers where a request names none; empty = the base."""
    leaving: frozenset[str] = frozenset()
    """Digests whose last requests are finishing; they take no new ones."""

    def adapter(self, digest: str) -> inference_pb2.LoadedAdapter | None:
        """A resident adapter that takes requests, or None."""
        return next((a for a in self.adapters if a.digest == digest and digest not in self.leaving), None)

    def names(self) -> list[str]:
        """What a request could name."""
        return [a.adapter for a in self.adapters if a.digest not in self.leaving]

    def digest_by_name(self, name: str) -> str:
        """The digest of the adapter that was loaded by this name; empty if none was."""
        return next((a.digest for a in self.adapters if a.adapter == name), "")

    def with_adapter(self, adapter: inference_pb2.LoadedAdapter) -> Table:
        """After loading; the same digest takes its old place."""
        others = tuple(a for a in self.adapters if a.digest != adapter.digest)
        return dataclasses.replace(self, adapters=(*others, adapter), leaving=self.leaving - {adapter.digest})

    def taking_leave(self, digest: str) -> Table:
        """While unloading: no new requests; if it was the default, the base is now."""
        default = "" if self.default == digest else self.default
        return dataclasses.replace(self, default=default, leaving=self.leaving | {digest})

    def without(self, digest: str) -> Table:
        """After unloading."""
        others = tuple(a for a in self.adapters if a.digest != digest)
        return dataclasses.replace(self, adapters=others, leaving=self.leaving - {digest})

    def switched(self, digest: str) -> Table:
        """After switching the default; the empty digest is the base."""
        return dataclasses.replace(self, default=digest)

    def listed(self) -> list[inference_pb2.LoadedAdapter]:
        """Every adapter as callers see it."""
        seen = []
        for adapter in self.adapters:
            copy = inference_pb2.LoadedAdapter()
            copy.CopyFrom(adapter)
            copy.is_default = adapter.digest == self.default
            seen.append(copy)
        return seen

    def who_answers(self, named: str, digest: str) -> str:
        """The digest that answers a request; NOT_FOUND if it is not loaded.

        `named` is what the request says, `digest` what that resolved to; both
        empty means the default.
        """
        if not named and not digest:
            if self.default and self.adapter(self.default) is None:
                raise not_loaded(f"adapters/{self.default}", self.names(), "it is the default")
            return self.default
        if digest and self.adapter(digest) is None:
            raise not_loaded(named, self.names(), f"that name is {short(digest)} now")
        return digest


def not_loaded(name: str, loaded: list[str], note: str = "") -> Fault:
    """NOT_FOUND: an adapter that is not in memory, with the nearest that is."""
    near = difflib.get_close_matches(name, loaded, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = ", ".join(loaded) or "none"
    told = f"{name!r} is not loaded" + (f" ({note})" if note else "")
    return Fault(errors_pb2.REASON_NOT_FOUND, f"{told}{hint}; loaded: {have}; load it first", resource=name)


def no_model(asked: str) -> Fault:
    """NOT_FOUND: nothing is loaded, or something else is."""
    name = asked or "models"
    return Fault(
        errors_pb2.REASON_NOT_FOUND,
        f"{asked!r} is not loaded; load it first" if asked else "no model is loaded; load one first",
        resource=name,
    )


def check_model(model: inference_pb2.LoadedModel | None, asked: str, digest: str) -> None:
    """NOT_FOUND if nothing is loaded, or a request names another model than the one that is."""
    if model is None:
        raise no_model(asked)
    if digest and digest != model.digest:
        fault = no_model(asked)
        fault.message += f"; {model.model} is loaded"
        raise fault


def check_reload(
    model: inference_pb2.LoadedModel, name: str, digest: str, precision: inference_pb2.Precision.ValueType
) -> None:
    """WRONG_STATE unless what is loaded is what is asked for."""
    if model.digest != digest:
        raise wrong_state(model.model, "loaded", [f"no other model loaded (unload it before {name})"])
    if precision not in (inference_pb2.PRECISION_UNSPECIFIED, model.precision):
        held = inference_pb2.Precision.Name(model.precision)
        raise wrong_state(model.model, f"loaded as {held}", [f"{held}, or the model unloaded first"])


def check_lineage(
    name: str, manifest: artifacts_pb2.Manifest, base_digest: str, base: ModelFacts, template_digest: str = ""
) -> None:
    """REJECTED if an adapter was trained on another base, tokenizer or template.

    `template_digest` is that of the prompt format it was trained with; empty
    where that is the base's own template.
    """
    told = manifest.lineage
    if told.base_digest != base_digest:
        raise rejected(
            name,
            f"check 'base': it was trained on {told.base_digest or 'a base it does not name'}; loaded is {base_digest}",
        )
    for what, theirs, ours in (
        ("tokenizer", told.tokenizer_digest, base.tokenizer_digest),
        ("template", told.template_digest, template_digest or base.template_digest),
    ):
        if theirs != ours:
            raise rejected(
                name, f"check '{what}': it was trained with {theirs or 'none'}; served would be {ours or 'none'}"
            )
