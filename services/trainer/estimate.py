"""What a job will take: memory by part and disk, before anything is loaded.

Law of this room: pure. Weights, adapter, gradients and optimiser are counted to
the byte from shapes; activations are counted tensor by tensor as the recipe's
graph keeps them; what is left (workspaces) is the one part that is judged.
Where it depends on the rows, the most that a micro-batch can hold is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlorad.v1 import trainer_pb2
from services.trainer import launch
from services.trainer.activations import Run, activations, targeted
from services.trainer.shape import ModelShape

BLOCK, NESTED = 64, 256
"""Weights under one scale; scales under one scale of scales."""
TABLES = 16 * 4, 256 * 4
"""NF4's table of each module, and that of its nested scales."""
ROW_BYTES = 12
"""Bytes of a ledger a token: id, mask, and up to seven of text; 8 to 9 were measured."""
GB = 1_000_000_000
HOLES = {2: 70, 4: 30}
"""Hundredths of the activations that the C library keeps in holes on a CPU, by the width of a number; large tensors
leave fewer. Judged: 52 to 76 were measured in bf16 with width 512, 110 with 768; 24 to 40 in fp32."""
BUDGETS = (8 * GB, 12 * GB, 16 * GB, 24 * GB)
STEP_TOKENS = 128
"""Micro-batches are proposed in steps of this."""
MOST_TOKENS = 1 << 17
FLOORS = {"cpu": 446_000_000, "cuda": 600_000_000}
"""torch, transformers, peft and bitsandbytes before a model is there. Measured on a CPU; for CUDA a guess."""
WORKSPACE = 38_000_000
"""What the libraries take once a model runs: 34 to 42 MB, measured over six runs on a CPU."""
_NOT_TENSORS = ("holes", "workspace", "framework", "mapped files")


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the memory or of the disk."""

    name: str
    bytes: int
    made_of: str
    reclaimable: bool = False
    """Whether the system takes it back when memory is short."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What would run in a budget."""

    budget_bytes: int
    tokens: int
    """The largest micro-batch that fits, 0 if none does."""
    needed_bytes: int
    """At that micro-batch, else at the smallest; without what is reclaimable."""
    advice: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer."""

    memory: tuple[Part, ...]
    """Of one process."""
    processes: int
    disk: tuple[Part, ...]
    fits: tuple[Fit, ...]

    @property
    def total_bytes(self) -> int:
        return self.processes * sum(p.bytes for p in self.memory)

    @property
    def needed_bytes(self) -> int:
        """Without what is reclaimable."""
        return self.processes * sum(p.bytes for p in self.memory if not p.reclaimable)

    @property
    def disk_bytes(self) -> int:
        return sum(p.bytes for p in self.disk)


def run_of(spec: trainer_pb2.TrainSpec, device: str) -> Run:
    """What of a resolved spec decides its cost; `device` as in "cuda:0"."""
    return Run(
        nf4=spec.quantization.method == trainer_pb2.QUANTIZATION_METHOD_NF4,
        double=spec.quantization.double_quantization,
        width=4 if spec.quantization.compute_type == trainer_pb2.COMPUTE_TYPE_FP32 else 2,
        rank=spec.lora.rank,
        dropout=spec.lora.dropout > 0,
        targets=frozenset(spec.lora.target_modules.names),
        tokens=spec.data.micro_batch_tokens,
        length=spec.data.max_length_tokens,
        packing=spec.data.packing,
        ranks=max(1, spec.parallelism.ranks),
        device=device.partition(":")[0],
        checkpointing=spec.memory.gradient_checkpointing,
        states=_states(spec.optimizer),
        zero3=spec.parallelism.zero_stage == 3,
        dora=spec.lora.dora,
    )


def _states(optimizer: trainer_pb2.Optimizer) -> int:
    return 2 if optimizer.kind != trainer_pb2.OPTIMIZER_KIND_SGD else int(optimizer.momentum > 0)


def estimate(shape: ModelShape, run: Run, rows: int, keep_last: int) -> Estimate:
    """Memory, disk, and what fits; `rows` of the dataset are trained on or held out."""
    return Estimate(memory(shape, run), run.ranks, disk(shape, run, rows, keep_last), fits(shape, run))


def to_proto(told: Estimate) -> trainer_pb2.EstimateJobResponse:
    """The answer as the contract has it."""
    return trainer_pb2.EstimateJobResponse(
        memory=[_part(p) for p in told.memory],
        processes=told.processes,
        memory_bytes=told.total_bytes,
        needed_bytes=told.needed_bytes,
        disk=[_part(p) for p in told.disk],
        disk_bytes=told.disk_bytes,
        fits=[
            trainer_pb2.EstimateFit(
                budget_bytes=f.budget_bytes,
                micro_batch_tokens=f.tokens,
                needed_bytes=f.needed_bytes,
                advice=f.advice,
            )
            for f in told.fits
        ],
    )


def _part(part: Part) -> trainer_pb2.EstimatePart:
    return trainer_pb2.EstimatePart(
        name=part.name, size_bytes=part.bytes, made_of=part.made_of, reclaimable=part.reclaimable
    )


# Memory.


def memory(shape: ModelShape, run: Run) -> tuple[Part, ...]:
    """Every part that one process holds at the worst moment of a step."""
    numbers, places = _size(lora_numbers(shape, run)), f"rank {run.rank} on {len(targeted(shape, run))} modules"
    kept, loss, layer = activations(shape, run), loss_bytes(shape, run), working_bytes(shape, run)
    count = lora_numbers(shape, run)
    held, grown, state = _trained(count, lora_tensors(shape, run), run)
    shown = "made again layer by layer" if run.checkpointing else f"of {shape.layers} layers"
    return (
        Part("base weights", base_bytes(shape, run), _base_words(shape, run)),
        Part("adapter", held, f"{numbers} weights, {places}, fp32"),
        Part("gradients", grown, "one for each of the adapter's weights, fp32"),
        Part("optimizer", state, _state_words(run)),
        Part("activations", kept, f"what the backward pass needs {shown}, {run.tokens} tokens"),
        Part(
            "logits and loss" if loss >= layer else "working memory",
            max(loss, layer),
            f"logits of {_at_a_time(shape, run)} tokens at a time, the head laid out, what all tokens give and get"
            if loss >= layer
            else "the backward pass of the widest layer, which takes more than the loss",
        ),
        Part("dequantised layer", temporary_bytes(shape, run), _temporary_words(run)),
        Part(
            "holes",
            kept * HOLES[run.width] // 100 if run.device == "cpu" else 0,
            "what the C library keeps between tensors",
        ),
        Part("workspace", WORKSPACE, "what the libraries take once a model runs"),
        Part("framework", FLOORS.get(run.device, FLOORS["cuda"]), "torch and its libraries before a model is there"),
        Part("mapped files", mapped_bytes(shape, run), "pages of the model's files, read while it was loaded", True),
    )


def tensor_bytes(shape: ModelShape, run: Run) -> int:
    """Bytes of tensors alone: what is counted, not what is judged."""
    return sum(p.bytes for p in memory(shape, run) if p.name not in _NOT_TENSORS)


def mapped_bytes(shape: ModelShape, run: Run) -> int:
    """Files of the compute type stay mapped on a CPU, since embeddings and norms are read in place."""
    if run.device != "cpu" or not run.nf4 or run.width != shape.file_width:
        return 0
    return sum(m.weights for m in shape.linears) * shape.file_width


def base_bytes(shape: ModelShape, run: Run) -> int:
    """The base's weights, exactly: as bitsandbytes lays them out, the rest in the compute type."""
    rotary = 2 * 4 * (shape.head // 2)
    rest = shape.others * run.width + rotary
    return rest + sum(nf4_bytes(m.weights, run.double) if run.nf4 else m.weights * run.width for m in shape.linears)


def nf4_bytes(weights: int, double: bool) -> int:
    """One module in NF4: half a byte a weight, its scales, its tables."""
    blocks = -(-weights // BLOCK)
    packed = -(-weights // 2)
    if not double:
        return packed + 4 * blocks + TABLES[0]
    return packed + blocks + 4 * -(-blocks // NESTED) + 4 + sum(TABLES)


def lora_numbers(shape: ModelShape, run: Run) -> int:
    """Weights that train."""
    return sum(run.rank * (m.outputs + m.inputs) + run.dora * m.outputs for m in targeted(shape, run))


def lora_tensors(shape: ModelShape, run: Run) -> int:
    """Tensors that train: A, B, and DoRA's magnitudes."""
    return (3 if run.dora else 2) * len(targeted(shape, run))


def _trained(count: int, tensors: int, run: Run) -> tuple[int, int, int]:
    """Bytes of adapter, gradients and optimiser state.

    AdamW keeps two numbers a weight and one a tensor; several ranks divide it.
    """
    if run.ranks == 1:
        return 4 * count, 4 * count, 4 * run.states * count + (4 * tensors if run.states == 2 else 0)
    return 4 * count, 4 * count, 4 * (1 + run.states) * -(-count // run.ranks)


def loss_bytes(shape: ModelShape, run: Run) -> int:
    """The most that the loss holds: some tokens' logits, the head laid out, and what all tokens give and get."""
    logits = 8 * _at_a_time(shape, run) * shape.vocabulary  # in fp32, and once more while they are summed
    laid_out = shape.vocabulary * shape.hidden * run.width if run.device == "cpu" else 0
    return logits + laid_out + 2 * run.tokens * shape.hidden * run.width


def _at_a_time(shape: ModelShape, run: Run) -> int:
    """Tokens whose logits are held together."""
    return min(run.tokens, max(1, launch.LOGITS_BYTES // (4 * shape.vocabulary)))


def working_bytes(shape: ModelShape, run: Run) -> int:
    """The most that the backward pass of one layer holds beside what was kept."""
    wide = max(shape.ffn, shape.heads * shape.head)
    return run.tokens * (4 * wide * run.width + 4 * 4 * shape.hidden)


def temporary_bytes(shape: ModelShape, run: Run) -> int:
    """The largest module as plain numbers, and once more as the processor wants it laid out."""
    largest = max((m.weights for m in shape.linears), default=0)
    made = 2 * largest * run.width if run.nf4 else largest * run.width
    if run.dora and not run.fast:  # peft makes BA whole, W + BA beside it, and a matrix of ones to make it with
        made += max((4 * (3 * m.weights + m.inputs**2) for m in targeted(shape, run)), default=0)
    return made


def _base_words(shape: ModelShape, run: Run) -> str:
    kind = "bf16" if run.width == 2 else "fp32"
    if not run.nf4:
        return f"{_size(shape.weights)} weights in {kind}"
    linear = sum(m.weights for m in shape.linears)
    scales = "one 8-bit scale per 64, one fp32 scale per 256 of them" if run.double else "one fp32 scale per 64"
    return (
        f"{_size(linear)} weights in NF4 with {scales}; {_size(shape.others)} of embeddings, norms and head in {kind}"
    )


def _state_words(run: Run) -> str:
    if run.states < 2:
        return "plain descent keeps nothing" if not run.states else "one fp32 number for each of the adapter's weights"
    if run.ranks == 1:
        return "AdamW: two fp32 numbers for each of the adapter's weights"
    return f"AdamW and an fp32 master, divided among {run.ranks} ranks"


def _temporary_words(run: Run) -> str:
    return (
        "the largest module as plain numbers, and laid out for the product"
        if run.nf4
        else "the largest module laid out"
    )


def _size(count: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return str(count)


# Disk.


def disk(shape: ModelShape, run: Run, rows: int, keep_last: int) -> tuple[Part, ...]:
    """What a job writes, at most."""
    one = checkpoint_bytes(shape, run)
    kept = keep_last + 1
    adapter = 4 * lora_numbers(shape, run) + _headers(shape, run) + 4096
    most = f"at most: {rows} rows of {run.length} tokens; less where rows are shorter"
    return (
        Part("checkpoints", kept * one, f"{kept} of {one} bytes: those kept and the one being written"),
        Part("adapter", adapter, "LoRA weights in fp32 and how they are named"),
        Part("ledger", rows * (run.length * ROW_BYTES + 64) + 24 * shape.vocabulary + 4096, most),
    )


def checkpoint_bytes(shape: ModelShape, run: Run) -> int:
    """Adapter, optimiser state and random state in files, at most."""
    tensors = lora_tensors(shape, run)
    return 4 * (1 + run.states) * lora_numbers(shape, run) + 4 * tensors + 4 * _headers(shape, run) + 6144


def _headers(shape: ModelShape, run: Run) -> int:
    return 192 * lora_tensors(shape, run)


# What fits.


def fits(shape: ModelShape, run: Run, budgets: tuple[int, ...] = BUDGETS) -> tuple[Fit, ...]:
    """For every budget the largest micro-batch, or what to change."""
    return tuple(fit(shape, run, budget) for budget in budgets)


def fit(shape: ModelShape, run: Run, budget: int) -> Fit:
    """The largest micro-batch that a budget holds; where even one row does not fit, what would help."""
    tokens = largest(shape, run, budget)
    if tokens:
        at = replace(run, tokens=tokens)
        room = "" if tokens >= run.tokens else f"; data.micro_batch_tokens={tokens} instead of {run.tokens}"
        return Fit(budget, tokens, needed(shape, at), f"fits{room}")
    least = replace(run, tokens=run.length)
    need = needed(shape, least)
    return Fit(budget, 0, need, "; ".join(_advice(shape, least, budget)))


def needed(shape: ModelShape, run: Run) -> int:
    """Bytes of all parts, all processes, without what is reclaimable."""
    return run.ranks * sum(p.bytes for p in memory(shape, run) if not p.reclaimable)


def largest(shape: ModelShape, run: Run, budget: int) -> int:
    """The largest micro-batch of at least one whole row within a budget; 0 if there is none."""
    if needed(shape, replace(run, tokens=run.length)) > budget:
        return 0
    low, high = run.length, max(run.length, MOST_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if needed(shape, replace(run, tokens=middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return max(run.length, low - low % STEP_TOKENS)


def _advice(shape: ModelShape, run: Run, budget: int) -> Iterator[str]:
    """What to change, one on top of the other, until it fits; the last word says if nothing does."""
    yield f"one row of {run.length} tokens takes {needed(shape, run) / GB:.1f} GB"
    for change, better in (
        ("parallelism.ranks=1", replace(run, ranks=1)),
        ("quantization.method=nf4", replace(run, ranks=1, nf4=True)),
        ("quantization.compute_type=bf16", replace(run, ranks=1, nf4=True, width=2)),
        ("quantization.double_quantization=true", replace(run, ranks=1, nf4=True, width=2, double=True)),
    ):
        before = needed(shape, run)
        if better == run or needed(shape, better) >= before:
            continue
        run = better
        yield f"{change} gives {needed(shape, run) / GB:.1f} GB"
        if needed(shape, run) <= budget:
            return
    length = run.length
    while length > 64 and needed(shape, replace(run, length=length, tokens=length)) > budget:
        length //= 2
    if needed(shape, replace(run, length=length, tokens=length)) <= budget:
        yield f"data.max_length_tokens={length} fits"
    else:
        yield "nothing in a spec makes it fit: take a smaller model"
