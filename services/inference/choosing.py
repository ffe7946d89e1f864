"""Which base answers a request, and what may be loaded beside what.

Law of this room: pure. Names were resolved to digests before they come here;
whatever is unclear is refused with what would be accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2
from services.common.errors import Fault, Violation, invalid, rejected, wrong_state
from services.common.facts import ModelFacts


def not_loaded(name: str, loaded: Sequence[str]) -> Fault:
    """NOT_FOUND: an adapter that is not in memory, with the nearest that is."""
    near = difflib.get_close_matches(name, loaded, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = ", ".join(loaded[:20]) or "none"
    message = f"{name!r} is not loaded{hint}; loaded: {have}; load it first"
    return Fault(errors_pb2.REASON_NOT_FOUND, message, resource=name)


def no_model(asked: str, loaded: Sequence[str] = ()) -> Fault:
    """NOT_FOUND: nothing is loaded, or something else is."""
    have = f"; loaded: {', '.join(loaded[:20])}" if loaded else ""
    return Fault(
        errors_pb2.REASON_NOT_FOUND,
        f"{asked!r} is not loaded{have}; load it first" if asked else "no model is loaded; load one first",
        resource=asked or "models",
    )


def choose_base(
    model_digest: str,
    model_name: str,
    adapter_name: str,
    adapter_base: str,
    default_base: str,
    loaded: Sequence[tuple[str, str]],
) -> str:
    """The digest of the base that answers.

    `adapter_base` is the base of the adapter that answers, `default_base` that of
    the default; empty = none. `loaded` are digests and names of what is, or would
    be, in memory. INVALID_ARGUMENT where it could be any of several, NOT_FOUND
    where it is none, REJECTED for an adapter of another base.
    """
    if adapter_base:
        if model_digest and model_digest != adapter_base:
            raise rejected(
                adapter_name, f"check 'base': it was trained on {adapter_base}; {model_name} is {model_digest}"
            )
        return adapter_base
    known = [name for _, name in loaded]
    if model_digest:
        if model_digest not in [digest for digest, _ in loaded]:
            raise no_model(model_name, known)
        return model_digest
    return default_base or only_one(loaded)


def only_one(loaded: Sequence[tuple[str, str]]) -> str:
    """The digest of the one base that is loaded; INVALID_ARGUMENT naming them if there are several."""
    if not loaded:
        raise no_model("")
    if len(loaded) > 1:
        raise invalid([Violation("model", "nothing", f"one of {', '.join(name for _, name in loaded)}")])
    return loaded[0][0]


def check_precision(model: inference_pb2.LoadedModel, precision: inference_pb2.Precision.ValueType) -> None:
    """WRONG_STATE unless what is loaded is held as it is asked for."""
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
