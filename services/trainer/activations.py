"""What the graph keeps between forward and backward, tensor by tensor.

Law of this room: pure; to the byte, for Llama-like models. Two ways are counted: the
worker's own forward (worker/fast), and that of transformers and peft, which is taken
where the first cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.shape import Linear, ModelShape

_READS = {
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "",
    "gate_proj": "feed-forward", "up_proj": "feed-forward",
}  # fmt: skip
"""Modules that read the same tensor; "" reads one that attention keeps anyway."""


@dataclass(frozen=True, slots=True)
class Run:
    """What of a spec decides its cost."""

    nf4: bool
    double: bool
    width: int
    """Bytes of a number in the compute type."""
    rank: int
    dropout: bool
    targets: frozenset[str]
    tokens: int
    """Of one micro-batch."""
    length: int
    """Longest row."""
    packing: bool
    ranks: int
    device: str
    """Its kind: "cpu" or "cuda"."""
    checkpointing: bool = False
    """Whether a layer's activations are made again in the backward pass."""
    states: int = 2
    """Numbers that the optimiser keeps of each weight."""
    zero3: bool = False
    dora: bool = False

    @property
    def fast(self) -> bool:
        """Whether the worker's own forward is taken; see worker/fast."""
        return self.device == "cpu" and not self.zero3


def targeted(shape: ModelShape, run: Run) -> list[Linear]:
    """The modules that get LoRA weights."""
    return [m for m in shape.linears if m.name in run.targets]


def _of_a_layer(shape: ModelShape, run: Run) -> dict[str, Linear]:
    """Those of one layer."""
    found = targeted(shape, run)
    return {m.name: m for m in found[: len(found) // max(1, shape.layers)]}


def activations(shape: ModelShape, run: Run) -> int:
    """Bytes that the graph keeps between forward and backward, without the loss."""
    one = _fast_layer if run.fast else _plain_layer
    whole = one(shape, run, True) + (shape.layers - 1) * one(shape, run, False)
    positions = run.tokens if run.packing else run.length  # rows under one another share them
    if run.fast and run.tokens > positions:
        positions = 0  # each layer has its own, of all rows
    ends = positions * 2 * shape.head * run.width
    ends += run.tokens * ((run.width * shape.hidden if run.fast else 4 * shape.hidden) + 4)
    if run.checkpointing:
        whole = run.tokens * shape.hidden * run.width * shape.layers + one(shape, run, False)
    return whole + ends


def _fast_layer(shape: ModelShape, run: Run, first: bool) -> int:
    """What one layer keeps; the first one's input has no gradient, so its norm keeps nothing."""
    lora = _of_a_layer(shape, run)
    norms = (1 if first else 2) * (shape.hidden * run.width + 4)
    read = sum(
        shape.hidden * run.width
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        if any(name in lora for name in group)
    )
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head * run.width
    if "o_proj" in lora:
        attention += shape.heads * shape.head * run.width
    forward = 2 * shape.ffn * run.width
    branches = sum(run.rank * run.width + (m.inputs if run.dropout else 0) for m in lora.values())
    sizes = sum(4 * m.outputs for m in lora.values()) if run.dora else 0
    if run.dora:
        branches += sum(m.outputs * run.width for m in lora.values())
    rows = 1 if run.packing else -(-run.tokens // run.length)
    turned = 2 * shape.head * run.width if rows > 1 else 0  # positions of each row, laid end to end
    return run.tokens * (norms + read + attention + forward + branches + turned) + sizes


def _plain_layer(shape: ModelShape, run: Run, first: bool) -> int:
    """What one layer keeps; the first one's input has no gradient, so its norm keeps nothing."""
    across = run.tokens if run.packing else run.length
    attention = 4 * shape.heads * shape.head * run.width + 4 * shape.heads + across * run.width
    norms = (1 if first else 2) * (4 * shape.hidden + 4)
    forward = (3 if shape.gated else 1) * shape.ffn * run.width
    kept = _lora_kept(shape, run, first) + (_dora_kept(shape, run) if run.dora else 0)
    whole = sum(12 * m.outputs for m in _of_a_layer(shape, run).values()) if run.dora else 0
    if run.dora and run.dropout and (run.nf4 or run.width < 4):  # W itself, in fp32
        whole += sum(4 * m.weights for m in _of_a_layer(shape, run).values())
    return run.tokens * (attention + norms + forward + kept) + whole


def _dora_kept(shape: ModelShape, run: Run) -> int:
    """Bytes a token that peft's DoRA keeps of a layer, at most: what W made of it, and what BA did."""
    outputs = sum(m.outputs for m in _of_a_layer(shape, run).values())
    return outputs * (4 + (4 if run.dropout else run.width))


def _lora_kept(shape: ModelShape, run: Run, first: bool) -> int:
    """Bytes a token that one layer's LoRA branches keep: their inputs in fp32, what dropout drew, and A's output."""
    names = _of_a_layer(shape, run)
    layer = list(names.values())
    kept = sum(4 * run.rank for m in layer)
    if run.dropout:
        noise = 4 if run.device == "cpu" else 1
        drawn = sum(m.inputs for n, m in names.items() if not (first and _READS.get(n) == "attention"))
        return kept + 4 * sum(m.inputs for m in layer) + noise * drawn
    if run.width < 4:
        return kept + 4 * sum(m.inputs for m in layer)
    shared = {_READS.get(name, name): m.inputs for name, m in names.items()}
    return kept + 4 * sum(inputs for reads, inputs in shared.items() if reads)
