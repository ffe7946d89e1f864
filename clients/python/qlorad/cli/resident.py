"""What must be in memory before a question: loads it where it is not, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlorad import errors
from qlorad._wire_core import full_name
from qlorad.cli.output import say

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.v1 import inference_pb2


def model(client: Client, name: str) -> inference_pb2.LoadedModel:
    """The model in memory, where need be in the place of others."""
    wanted = full_name("models", name)
    if all(wanted not in (m.model, f"models/{m.digest}") for m in client.inference.loaded_models()):
        say(f"loading {wanted} …")
    return client.inference.load_model(name)


def adapter(client: Client, name: str, pin: bool = False) -> inference_pb2.LoadedAdapter:
    """The adapter in memory, after its base."""
    wanted = full_name("adapters", name)
    if all(wanted not in (a.adapter, f"adapters/{a.digest}") for a in client.inference.loaded_adapters()):
        say(f"loading {wanted} …")
    try:
        return client.inference.load_adapter(name, pin=pin)
    except errors.FailedPrecondition as e:
        if e.reason != "WRONG_STATE":
            raise
    model(client, client.adapters.get(name).lineage.base_digest)
    return client.inference.load_adapter(name, pin=pin)


def ready(client: Client, base: str, adapters: list[str]) -> None:
    """All that a question needs: the base named or meant, and the adapters ("base" and "" need none)."""
    if base:
        model(client, base)
    for name in adapters:
        if name not in ("", "base"):
            adapter(client, name)
    if not client.inference.loaded_models():
        raise errors.NotFound("no model is loaded; name one with --model, or an adapter with --adapter")
