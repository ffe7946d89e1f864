"""The full state of a run at a step, as safetensors and JSON; never pickle.

Law of this room: a run that goes on from here ends in the same bytes as one
that was never cut. Nothing of clocks or machines is written. How many ranks
wrote a checkpoint does not matter to those who read it.

What W ranks write:

    adapter/adapter_config.json           a whole plain adapter,
    adapter/adapter_model.safetensors     as the end of a run writes it
    adapter.json                          its facts (AdapterFacts) and lineage (Lineage as protojson): with these
                                          the folder adapter/ can be sealed as an adapter without torch
    optimizer-00001-of-0000W.safetensors  the optimiser's state, whole for each parameter, under STATE:PARAMETER; rank
                                          r writes the parameters whose place in the order of names is r modulo W
    rng-00001-of-0000W.safetensors        a rank's random state
    state.json                            where the run is
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict, dataclass

import torch
from google.protobuf import json_format
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlorad.v1 import artifacts_pb2, trainer_pb2
from services.common.errors import corrupt
from services.common.worker import adapter

FORMAT = 2
ADAPTER = "adapter"
_NUMBERS = "numbers"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    job: str
    step: int = 0
    loss_average: float = 0.0
    """Smoothed loss, still with start bias."""
    epoch_tokens: int = 0
    """Tokens consumed in the epoch under way."""
    epoch_trained: int = 0
    """Of these, those that the ledger marks as trained."""
    epoch_rows: str = ""
    """The number of the rows consumed in it: see tally.py; empty where it is not known."""
    loss_distance: float = 0.0
    """Smoothed distance of a step's loss from the smoothed one, still with start bias."""
    loss_steps: int = -1
    """Steps that both are of; -1 = every step."""
    skipped: int = 0
    """Steps whose gradient was thrown away."""
    skips: int = 0
    """Of these, the newest in a row."""
    loss_scale: float = 0.0
    """Of fp16; 0 = not begun."""
    scale_steps: int = 0
    """Steps since it changed."""
    evaluated: int = -1
    """The step of the newest evaluation; -1 = not known."""
    eval_loss: float | None = None
    """What it gave."""
    best_loss: float | None = None
    """The lowest since training began."""
    best_step: int = 0
    """Its step."""
    stale: int = 0
    """Evaluations in a row without improvement."""


@dataclass(frozen=True, slots=True)
class About:
    """What an adapter is besides its tensors; the same for every checkpoint of an attempt."""

    lora: trainer_pb2.Lora
    facts: dict
    """services/common/facts.AdapterFacts."""
    lineage: artifacts_pb2.Lineage

    def write(self, folder: pathlib.Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Writes an adapter as plain peft does; returns its tensors. Does not judge their values."""
        plain = {adapter.plain_name(n): w.to("cpu", torch.float32).contiguous() for n, w in weights.items()}
        shape = self.lora
        targets = list(shape.target_modules.names)
        adapter.save_tensors(folder, plain, shape.rank, shape.alpha, shape.dropout, targets, shape.rslora)
        return plain


def write(folder: pathlib.Path, progress: Progress, engine, rng: dict[str, torch.Tensor], about: About) -> None:
    """Writes this rank's part; every rank must call it."""
    weights = engine.weights()
    state: dict = {}
    for number, (name, own) in enumerate(engine.state()):
        if number % engine.world == engine.rank:
            state |= {f"{key}:{name}": value for key, value in own.items()}
    _save(state, folder / _shard("optimizer", engine.rank, engine.world))
    save_file(rng, folder / _shard("rng", engine.rank, engine.world))
    if engine.rank != 0:
        return
    (folder / ADAPTER).mkdir()
    about.write(folder / ADAPTER, weights)
    lineage = json_format.MessageToDict(about.lineage, preserving_proto_field_name=True)
    _json(folder / "adapter.json", {"facts": about.facts, "lineage": lineage})
    _json(folder / "state.json", {"format": FORMAT, "ranks": engine.world, **asdict(progress)})


def read(folder: pathlib.Path, job: str, engine) -> Progress:
    """Puts a run back where it was, on every rank; DATA_LOSS if the checkpoint is not of this run."""
    told = json.loads((folder / "state.json").read_text())
    if told.get("format") != FORMAT:
        raise corrupt("checkpoint", f"has format {told.get('format')}; this version reads {FORMAT}")
    if told["job"] != job:
        raise corrupt("checkpoint", f"is not of jobs/{job}")
    told.pop("format")
    wrote = told.pop("ranks")
    saved = adapter.read_tensors(folder / ADAPTER)
    names = {adapter.plain_name(name): name for name in engine.parameters}
    if saved.keys() != names.keys():
        raise corrupt("checkpoint", f"holds other tensors: {sorted(saved.keys() ^ names.keys())[:3]}")
    state: dict[str, dict] = {}
    for rank in range(wrote):
        for key, value in _load(folder / _shard("optimizer", rank, wrote)).items():
            kind, _, name = key.partition(":")
            state.setdefault(name, {})[kind] = value
    engine.restore({names[plain]: tensor for plain, tensor in saved.items()}, state)
    if engine.rank < wrote:
        set_rng(load_file(folder / _shard("rng", engine.rank, wrote)))
    return Progress(**told)


def read_weights(folder: pathlib.Path) -> tuple[dict[str, torch.Tensor], int]:
    """The adapter of a checkpoint, under the names of its file, and the step it was written at."""
    return adapter.read_tensors(folder / ADAPTER), int(json.loads((folder / "state.json").read_text())["step"])


def _shard(kind: str, rank: int, world: int) -> str:
    return f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _json(path: pathlib.Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


def _save(values: dict, path: pathlib.Path) -> None:
    """Tensors, and plain numbers as tensors of one; what shares memory is written twice."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in values.items():
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    numbers = sorted(key for key, value in values.items() if not isinstance(value, torch.Tensor))
    save_file(tensors, path, metadata={_NUMBERS: json.dumps(numbers)})


def _load(path: pathlib.Path) -> dict:
    with safe_open(path, "pt") as f:
        numbers = set(json.loads((f.metadata() or {}).get(_NUMBERS, "[]")))
        return {key: f.get_tensor(key).item() if key in numbers else f.get_tensor(key) for key in f.keys()}


def get_rng(device: str) -> dict[str, torch.Tensor]:
    """The random state of this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng(state: dict[str, torch.Tensor]) -> None:
    """Puts a random state back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
