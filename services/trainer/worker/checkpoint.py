"""The full state of a run at a step, as safetensors and JSON; never pickle.

Law of this room: a run that goes on from here ends in the same bytes as one
that was never cut. Nothing of clocks or machines is written.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file, save_file

from services.common.errors import corrupt

FORMAT = 1


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


def write(folder: pathlib.Path, progress: Progress, parameters, optimizer, rng: dict[str, torch.Tensor]) -> None:
    """Writes adapter, optimiser, random state and position."""
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / "adapter.safetensors")
    state = {}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{key}:{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(state, folder / "optimizer.safetensors")
    save_file(rng, folder / "rng.safetensors")
    text = json.dumps({"format": FORMAT, **asdict(progress)}, indent=1, sort_keys=True)
    (folder / "state.json").write_text(text + "\n")


def read(folder: pathlib.Path, job: str, parameters, optimizer) -> Progress:
    """Puts a run back where it was; DATA_LOSS if the checkpoint is not of this run."""
    told = json.loads((folder / "state.json").read_text())
    if told.pop("format") != FORMAT or told["job"] != job:
        raise corrupt("checkpoint", f"is not of jobs/{job}")
    saved = load_file(folder / "adapter.safetensors")
    if saved.keys() != parameters.keys():
        raise corrupt("checkpoint", f"holds other tensors: {sorted(saved.keys() ^ parameters.keys())[:3]}")
    state = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
            own = {k.partition(":")[0]: v for k, v in state.items() if k.partition(":")[2] == name}
            if own:
                optimizer.state[p] = {k: _back(k, v, p.device) for k, v in own.items()}
    set_rng(load_file(folder / "rng.safetensors"))
    return Progress(**told)


def read_weights(folder: pathlib.Path) -> tuple[dict[str, torch.Tensor], Progress]:
    """The adapter of a checkpoint, and where the run was."""
    told = json.loads((folder / "state.json").read_text())
    told.pop("format")
    return load_file(folder / "adapter.safetensors"), Progress(**told)


def _back(key: str, value: torch.Tensor, device: torch.device):
    """A piece of an optimiser's state as it was: bitsandbytes counts steps in whole numbers."""
    if key != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)


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
