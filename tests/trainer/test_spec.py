"""Templates, presence, and every violation at once."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.trainer import spec
from services.trainer.app import TEMPLATES, read_templates
from tests.house import ROOT

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = spec.ModelKnown("sha256:" + "a" * 64, 256, LLAMA)
DATASET = spec.DatasetKnown("sha256:" + "b" * 64, {"train": 9, "validation": 2})
BERT = spec.ModelKnown("sha256:" + "c" * 64, 256, ("query", "key", "value", "dense"), "BertForMaskedLM")
HOST = spec.Host("cpu", 4)
SHIPPED = (
    "7b-8gb",
    "all-linear",
    "bert-mlm",
    "full-attention",
    "m1-max-32gb",
    "minimal-q",
    "mlp",
    "standard",
    "zero2",
    "zero3",
    "zero3-offload",
)


def wanted() -> trainer_pb2.JobSpec:
    return trainer_pb2.JobSpec(train=trainer_pb2.TrainSpec(model="models/m", dataset="datasets/d"))


def faults(template: str, override: trainer_pb2.JobSpec, **known: object) -> dict[str, tuple[str, str]]:
    look = {"model": MODEL, "dataset": DATASET, "host": HOST, **known}
    resolved = spec.resolve(read_templates(TEMPLATES)[template], override, **look)  # type: ignore[arg-type]
    return {v.field.removeprefix("spec.train."): (v.given, v.accepted) for v in resolved.violations}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_template_is_sound(name: str) -> None:
    assert tuple(sorted(read_templates(TEMPLATES))) == SHIPPED
    assert read_templates(TEMPLATES)[name].description
    assert faults(name, wanted(), model=BERT if name == "bert-mlm" else MODEL) == {}


def test_the_page_has_every_template() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert tuple(sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE))) == SHIPPED


def test_a_template_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="ranke"):
        spec.read_template("bad", {"spec": {"train": {"lora": {"ranke": 1}}}})


def test_a_template_begins_with_the_values_of_another() -> None:
    trees: dict[str, object] = {
        "a": {"spec": {"train": {"lora": {"rank": 4, "alpha": 8.0}, "seed": 1}}},
        "b": {"extends": "a", "description": "b", "spec": {"train": {"lora": {"rank": 6}}}},
        "c": {"extends": "b", "spec": {"train": {"lora": {"alpha": 0.0}, "seed": 0}}},
    }
    made = spec.read_templates(trees)
    assert (made["b"].extends, made["b"].description, made["b"].spec.train.lora.rank) == ("a", "b", 6)
    train = made["c"].spec.train
    assert (train.lora.rank, train.lora.alpha, train.seed) == (6, 0.0, 0), "what is set counts, also where it is 0"
    assert train.HasField("seed")
    with pytest.raises(ValueError, match="template d: extends 'nobody'"):
        spec.read_templates({**trees, "d": {"extends": "nobody"}})
    with pytest.raises(ValueError, match="extends itself: e -> f -> e"):
        spec.read_templates({"e": {"extends": "f"}, "f": {"extends": "e"}})


def test_momentum_is_of_descent_alone() -> None:
    override = wanted()
    override.train.optimizer.momentum = 0.9
    assert set(faults("standard", override)) == {"optimizer.momentum"}
    override.train.optimizer.kind = trainer_pb2.OPTIMIZER_KIND_SGD
    assert faults("standard", override) == {}


def test_what_is_set_replaces_what_is_not_stays() -> None:
    override = wanted()
    override.train.lora.rank = 3
    override.train.lora.target_modules.names.append("o_proj")
    override.train.schedule.epochs = 0.5
    resolved = spec.resolve(read_templates(TEMPLATES)["standard"], override, MODEL, DATASET, HOST)
    assert not resolved.violations
    train = resolved.spec.train
    assert (train.lora.rank, list(train.lora.target_modules.names), train.lora.alpha) == (3, ["o_proj"], 32)
    assert (train.schedule.epochs, train.schedule.kind) == (0.5, trainer_pb2.SCHEDULE_KIND_COSINE)
    assert train.model == f"models/{MODEL.digest}" and train.dataset == f"datasets/{DATASET.digest}"
    assert train.threads == 4 and train.data.max_length_tokens == 256, "inherited values bend to host and model"


def test_all_linear_becomes_the_models_own_names() -> None:
    resolved = spec.resolve(read_templates(TEMPLATES)["all-linear"], wanted(), MODEL, DATASET, HOST)
    assert list(resolved.spec.train.lora.target_modules.names) == sorted(LLAMA)


def test_an_explicit_zero_is_given() -> None:
    override = wanted()
    override.train.lora.rank = 0
    assert faults("standard", override)["lora.rank"] == ("0", "1 to 512")


def test_all_violations_at_once() -> None:
    override = wanted()
    train = override.train
    train.quantization.method = 99  # type: ignore[assignment]
    train.lora.rank, train.lora.alpha, train.lora.dropout = 0, 0, 1
    train.lora.target_modules.names.extend(["q_prj", "v_proj", "v_proj"])
    train.data.max_length_tokens, train.data.micro_batch_tokens, train.data.accumulation = 4096, 8, 1
    train.data.prompt_format = 99  # type: ignore[assignment]
    train.optimizer.learning_rate, train.optimizer.beta1 = float("nan"), 1
    train.schedule.max_steps, train.schedule.warmup_steps = 10, 10
    train.evaluation.every_steps = 5
    train.checkpoints.keep_last, train.checkpoints.keep_best, train.checkpoints.keep_every_steps = 0, 1001, 1 << 31
    train.evaluation.min_improvement, train.evaluation.patience = -1, 1 << 31
    train.schedule.warmup_share, train.schedule.floor_share, train.schedule.decay_share = 1, 2, 0
    train.schedule.kind = trainer_pb2.SCHEDULE_KIND_STABLE_DECAY
    train.guards.not_finite = trainer_pb2.TROUBLE_POLICY_CONTINUE
    train.guards.all_masked = trainer_pb2.TROUBLE_POLICY_CONTINUE
    train.guards.spike, train.guards.spike_factor, train.guards.max_skips = 99, 1, 0  # type: ignore[assignment]
    train.data.step_tokens, train.data.length_grouping = 1 << 31, True
    train.limits.max_attempts = 0
    train.adapter = "adapters/Bad Name"
    train.threads = 64
    found = faults("standard", override, dataset=spec.DatasetKnown(DATASET.digest, {"train": 0}))
    assert set(found) == {
        "dataset",
        "quantization.method",
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.target_modules.names",
        "data.max_length_tokens",
        "data.micro_batch_tokens",
        "data.accumulation",
        "data.prompt_format",
        "optimizer.learning_rate",
        "optimizer.beta1",
        "schedule.warmup_steps",
        "evaluation.every_steps",
        "evaluation.patience",
        "evaluation.min_improvement",
        "checkpoints.keep_last",
        "checkpoints.keep_best",
        "checkpoints.keep_every_steps",
        "schedule.warmup_share",
        "schedule.floor_share",
        "schedule.decay_share",
        "guards.not_finite",
        "guards.spike",
        "guards.spike_factor",
        "guards.all_masked",
        "guards.max_skips",
        "data.step_tokens",
        "data.length_grouping",
        "limits.max_attempts",
        "adapter",
        "threads",
    }
    assert "did you mean 'q_proj'" in found["lora.target_modules.names"][1]
    assert found["guards.not_finite"] == ("3", "TROUBLE_POLICY_STOP, TROUBLE_POLICY_SKIP")
    assert "TROUBLE_POLICY_CONTINUE" in found["guards.spike"][1]
    assert "256 (the model's context)" in found["data.max_length_tokens"][1]
    assert "PROMPT_FORMAT_CHATML" in found["data.prompt_format"][1]


@pytest.mark.parametrize(
    ("template", "given_", "field", "nearest"),
    [
        ("standard", {"evaluation.patience": 3}, "evaluation.patience", "every_steps above 0"),
        ("standard", {"evaluation.keep_best_adapter": True}, "evaluation.keep_best_adapter", "False where"),
        ("standard", {"checkpoints.keep_best": 1}, "checkpoints.keep_best", "0 where evaluation.every_steps is 0"),
        ("standard", {"evaluation.patience": 3, "evaluation.every_steps": 2}, "", ""),
        ("standard", {"data.length_grouping": True}, "data.length_grouping", "or packing False"),
        ("standard", {"data.length_grouping": True, "data.packing": False}, "", ""),
        ("standard", {"data.step_tokens": 4096}, "", ""),
        ("standard", {"data.step_tokens": 4096, "data.accumulation": 2}, "data.accumulation", "or step_tokens 0"),
        ("standard", {"data.accumulation": 0}, "data.accumulation", "0 with data.step_tokens"),
        ("standard", {"data.micro_batch_tokens": 0, "memory.budget_bytes": 10**9}, "", ""),
        (
            "standard",
            {"data.micro_batch_tokens": 0},
            "memory.budget_bytes",
            "above 0 where data.micro_batch_tokens is 0",
        ),
        ("standard", {"schedule.floor_share": 0.1}, "", ""),
        ("standard", {"schedule.floor_share": 0.1, "schedule.kind": 1}, "schedule.floor_share", "0 where kind"),
        ("standard", {"schedule.kind": 5, "schedule.decay_share": 0.0}, "schedule.decay_share", "above 0"),
        ("standard", {"quantization.method": 3}, "", ""),
        ("standard", {"quantization.compute_type": 3, "optimizer.kind": 5}, "", ""),
        ("standard", {"optimizer.kind": 3, "optimizer.momentum": 0.5}, "optimizer.momentum", "AdamW's momentum"),
        ("zero2", {"quantization.method": 3}, "quantization.method", "QUANTIZATION_METHOD_NF4 or"),
        (
            "zero2",
            {"quantization.compute_type": 3},
            "quantization.compute_type",
            "or COMPUTE_TYPE_FP32 where",
        ),
    ],
)
def test_values_that_do_not_fit_one_another_are_refused(
    template: str, given_: dict[str, object], field: str, nearest: str
) -> None:
    override = wanted()
    for path, value in given_.items():
        group, name = path.split(".")
        setattr(getattr(override.train, group), name, value)
    found = faults(template, override)
    assert set(found) == ({field} if field else set())
    assert not field or nearest in found[field][1]


def test_inherited_values_bend_to_given_ones() -> None:
    shipped = read_templates(TEMPLATES)["standard"]
    train = shipped.spec.train
    train.data.packing, train.data.length_grouping = False, True
    train.data.accumulation, train.data.step_tokens = 0, 4096
    train.schedule.floor_share, train.data.micro_batch_tokens, train.memory.budget_bytes = 0.1, 0, 10**9
    override = wanted()
    override.train.data.packing = True
    override.train.schedule.kind = trainer_pb2.SCHEDULE_KIND_CONSTANT
    override.train.data.accumulation = 2
    found = spec.resolve(shipped, override, MODEL, DATASET, HOST)
    after = found.spec.train
    assert not found.violations and not after.data.length_grouping and after.schedule.floor_share == 0
    assert (after.data.step_tokens, after.data.micro_batch_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("template", "path", "value", "field", "nearest"),
    [
        ("zero2", "parallelism.zero_stage", 4, "parallelism.zero_stage", "1, 2 or 3 where ranks is above 1"),
        ("zero2", "parallelism.zero_stage", 0, "parallelism.zero_stage", "1, 2 or 3 where ranks is above 1"),
        ("zero2", "parallelism.ranks", 65, "parallelism.ranks", "1 to 64"),
        (
            "zero2",
            "parallelism.offload",
            trainer_pb2.OFFLOAD_ALL,
            "parallelism.offload",
            "or zero_stage 3",
        ),
        ("zero2", "parallelism.offload", 7, "parallelism.offload", "OFFLOAD_OPTIMIZER, OFFLOAD_ALL"),
        ("standard", "parallelism.offload", trainer_pb2.OFFLOAD_ALL, "parallelism.offload", "where ranks is 1"),
        ("standard", "parallelism.zero_stage", 2, "parallelism.zero_stage", "0 where ranks is 1"),
        ("zero3", "lora.dora", True, "lora.dora", "or zero_stage 2"),
        (
            "zero2",
            "optimizer.kind",
            trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT,
            "optimizer.kind",
            "OPTIMIZER_KIND_ADAMW",
        ),
        ("zero3", "optimizer.kind", trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW, "optimizer.kind", "cannot be divided anew"),
        ("zero2", "checkpoints.every_steps", 5, "", ""),
        ("zero2", "quantization.compute_type", trainer_pb2.COMPUTE_TYPE_FP32, "", ""),
        ("zero2", "optimizer.kind", trainer_pb2.OPTIMIZER_KIND_SGD, "", ""),
        ("zero2", "parallelism.offload", trainer_pb2.OFFLOAD_OPTIMIZER, "", ""),
        ("zero2", "parallelism.zero_stage", 1, "", ""),
        ("zero3-offload", "parallelism.ranks", 1, "", ""),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(
    template: str, path: str, value: int, field: str, nearest: str
) -> None:
    override = wanted()
    group, name = path.split(".")
    setattr(getattr(override.train, group), name, value)
    found = faults(template, override)
    assert set(found) == ({field} if field else set())
    if field:
        assert nearest in found[field][1]


def test_ranks_run_on_processors_and_on_cuda() -> None:
    assert faults("zero2", wanted(), host=spec.Host("cuda:0", 8)) == {}, "how many devices there are, the desk knows"
    assert "1 on mps" in faults("zero2", wanted(), host=spec.Host("mps", 8))["parallelism.ranks"][1]


def test_full_precision_bends_what_is_inherited_and_refuses_what_is_given() -> None:
    override = wanted()
    override.train.quantization.method = trainer_pb2.QUANTIZATION_METHOD_NONE
    assert faults("standard", override) == {}
    override.train.quantization.double_quantization = True
    assert "False" in faults("standard", override)["quantization.double_quantization"][1]


def test_fields_of_a_later_version_are_named_not_dropped() -> None:
    later = trainer_pb2.CreateJobRequest()
    later.ParseFromString(wanted_bytes() + b"\xf8\x07\x01")  # field 127, varint 1
    wrong = list(spec.unknown(later, "request"))
    assert len(wrong) == 1 and "127" in wrong[0].given


def wanted_bytes() -> bytes:
    return trainer_pb2.CreateJobRequest(request_id="a", spec=wanted()).SerializeToString()


@given(st.data())
def test_resolve_never_raises_and_never_bends_what_was_given(data: st.DataObject) -> None:
    override = wanted()
    train = override.train
    rank = data.draw(st.integers(0, 1000))
    length = data.draw(st.integers(0, 1 << 20))
    rate = data.draw(st.floats())
    train.lora.rank, train.data.max_length_tokens, train.optimizer.learning_rate = rank, length, rate
    resolved = spec.resolve(read_templates(TEMPLATES)["standard"], override, MODEL, DATASET, HOST)
    after = resolved.spec.train
    assert (after.lora.rank, after.data.max_length_tokens) == (rank, length)
    fields = {v.field for v in resolved.violations}
    assert ("spec.train.lora.rank" in fields) == (not 1 <= rank <= 512)
    assert ("spec.train.data.max_length_tokens" in fields) == (not 8 <= length <= 256)
    assert ("spec.train.optimizer.learning_rate" in fields) == (not 0 < rate <= 1)
