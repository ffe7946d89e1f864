"""Every preset and every rank learns; LoRA and QLoRA alike. Real runs of a hundred steps in this process."""

from __future__ import annotations

import pathlib

import pytest

from qlorad.v1 import registry_pb2, registry_pb2_grpc, trainer_pb2
from services.common.frames.v1 import training_pb2
from tests.house import house
from tests.trainer.kit import MODEL, seal_dataset
from tests.trainer.lives import Life

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS = 100
DEMO = "models/starter-demo"
PRESETS = ("standard", "minimal-q", "full-attention", "mlp", "7b-8gb", "m1-max-32gb")


def learnt(
    home: pathlib.Path, folder: pathlib.Path, template: str, model: str = DEMO, **fields: float
) -> list[training_pb2.Fact]:
    """A run of a preset at a rate for a small model, everything else as it is shipped."""
    train = trainer_pb2.TrainSpec(model=model, dataset="datasets/ladder", threads=1, seed=3)
    train.schedule.max_steps = STEPS
    train.optimizer.learning_rate = 5e-3
    train.data.max_length_tokens, train.data.micro_batch_tokens = 128, 512
    for path, value in fields.items():
        group, name = path.split("__")
        setattr(getattr(train, group), name, value)
    life = Life(home, folder, trainer_pb2.JobSpec(train=train), template=template)
    told = life.attempt()
    assert told[-1].HasField("finished"), told[-1]
    return told


def losses(told: list[training_pb2.Fact]) -> list[float]:
    found = [f.step.loss for f in told if f.HasField("step")]
    assert len(found) == STEPS
    return found


def tens(values: list[float]) -> list[float]:
    """Means of ten steps each."""
    return [sum(values[n : n + 10]) / 10 for n in range(0, len(values), 10)]


@pytest.fixture
def ladder_home(home: pathlib.Path) -> pathlib.Path:
    """The test starter and rows."""
    seal_dataset(home, "ladder", {"train": 64})
    return home


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The demo starter, made by the real registry in some minutes, and rows."""
    at = tmp_path_factory.mktemp("ladder") / "home"
    with house(at) as made:
        made.start("registry")
        stub = registry_pb2_grpc.ModelServiceStub(made.channel("registry"))
        asked = registry_pb2.MakeStarterModelRequest(request_id="demo", size=registry_pb2.STARTER_SIZE_DEMO)
        last = list(stub.MakeStarterModel(asked, timeout=900))[-1].model
    assert last.name == DEMO and last.state == registry_pb2.MODEL_STATE_READY, last
    seal_dataset(at, "ladder", {"train": 64})
    return at


def test_lora_and_qlora_on_every_linear_module_learn_alike(demo_home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calm = {"optimizer__learning_rate": 1e-3}  # at more, sixty-four rows are learnt by heart, and what is left is noise
    quantised = tens(losses(learnt(demo_home, tmp_path / "q", "all-linear", **calm)))
    none = trainer_pb2.QUANTIZATION_METHOD_NONE
    plain = tens(losses(learnt(demo_home, tmp_path / "p", "all-linear", quantization__method=none, **calm)))
    for curve in (quantised, plain):
        assert curve[-1] <= 0.7 * curve[0], curve
    apart = [abs(q - p) / p for q, p in zip(quantised, plain, strict=True)]
    assert max(apart) <= 0.05, apart


@pytest.mark.parametrize("template", PRESETS)
def test_every_preset_learns(demo_home: pathlib.Path, tmp_path: pathlib.Path, template: str) -> None:
    curve = tens(losses(learnt(demo_home, tmp_path / "it", template)))
    assert curve[-1] <= 0.97 * curve[0], curve


def test_every_rank_learns_and_takes_memory_by_its_size(demo_home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sizes = {}
    for rank in (4, 8, 16, 32):
        told = learnt(demo_home, tmp_path / str(rank), "standard", lora__rank=rank)
        curve = tens(losses(told))
        assert curve[-1] <= 0.97 * curve[0], (rank, curve)
        (planned,) = [f.planned for f in told if f.HasField("planned")]
        (weights,) = [f.size_bytes for f in told[-1].finished.files if f.path.endswith(".safetensors")]
        assert weights > 4 * planned.trainable_parameters, "fp32, and a header"
        sizes[rank] = planned.trainable_parameters
    assert [sizes[r] / sizes[4] for r in (4, 8, 16, 32)] == [1, 2, 4, 8]


@pytest.mark.parametrize("method", ["NF4", "INT8", "NONE"])
@pytest.mark.parametrize("kind", [n for n in trainer_pb2.OptimizerKind.keys() if not n.endswith("UNSPECIFIED")])
def test_every_form_of_base_and_optimiser_learns(
    ladder_home: pathlib.Path, tmp_path: pathlib.Path, method: str, kind: str
) -> None:
    told = learnt(
        ladder_home, tmp_path / "it", "all-linear", MODEL,
        quantization__method=trainer_pb2.QuantizationMethod.Value(f"QUANTIZATION_METHOD_{method}"),
        optimizer__kind=trainer_pb2.OptimizerKind.Value(kind),
        optimizer__learning_rate=0.5 if kind.endswith("SGD") else 5e-3,
        optimizer__momentum=0.9 if kind.endswith("SGD") else 0.0,
    )  # fmt: skip
    curve = tens(losses(told))
    assert curve[-1] <= 0.97 * curve[0], curve
    paged = [f.fallback for f in told if f.HasField("fallback")]
    assert len(paged) == ("PAGED" in kind), "on a CPU there is nothing to page to, and that is told"
    (planned,) = [f.planned for f in told if f.HasField("planned")]
    assert ("PAGED" in trainer_pb2.OptimizerKind.Name(planned.chosen.optimizer)) is False
