"""What a device can do of what was asked: a table."""

from __future__ import annotations

import pytest

from qlorad.v1 import trainer_pb2
from services.common.facts import ModelFacts
from services.trainer import launch, plan
from services.trainer.plan import BF16, FP16, FP32, INT8, NF4, NONE, DeviceFacts, Form

GB = 1_000_000_000
ADAMW, ADAMW8 = trainer_pb2.OPTIMIZER_KIND_ADAMW, trainer_pb2.OPTIMIZER_KIND_ADAMW_8BIT
PAGED, PAGED8 = trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW, trainer_pb2.OPTIMIZER_KIND_PAGED_ADAMW_8BIT
SGD = trainer_pb2.OPTIMIZER_KIND_SGD

CUDA8, CUDA24 = DeviceFacts("cuda", 8 * GB, True, True), DeviceFacts("cuda", 24 * GB, True, True)
OLD_CUDA = DeviceFacts("cuda", 16 * GB, False, True)
BARE_CUDA = DeviceFacts("cuda", 24 * GB, True, False)
MPS = DeviceFacts("mps", 32 * GB, True, False)
OLD_MPS = DeviceFacts("mps", 32 * GB, False, False)
CPU, OLD_CPU = DeviceFacts("cpu", 64 * GB, True, True), DeviceFacts("cpu", 64 * GB, False, True)
SMALL_CPU = DeviceFacts("cpu", 8 * GB, True, True)
BARE_CPU = DeviceFacts("cpu", 64 * GB, True, False)

SEVEN = ModelFacts(
    "LlamaForCausalLM", "llama", 6_738_415_616, 3_867_000_000, 4096, 32000, ("q_proj",), "", "", False, "", (2,)
)


def weights(form: Form) -> int:
    """What a 7B Llama takes."""
    spec = trainer_pb2.TrainSpec()
    plan.use(spec, form)
    return launch.weight_bytes(SEVEN, spec)


@pytest.mark.parametrize(
    ("facts", "asked", "used", "why"),
    [
        (CUDA8, (NF4, BF16, PAGED8), (NF4, BF16, PAGED8), []),
        (CUDA8, (NF4, FP16, ADAMW), (NF4, FP16, ADAMW), []),
        (CUDA8, (NONE, BF16, ADAMW), (NF4, BF16, ADAMW), ["13.5 of the device's 8.0 GB"]),
        (CUDA8, (INT8, BF16, ADAMW), (NF4, BF16, ADAMW), ["7.0 of the device's 8.0 GB"]),
        (CUDA24, (NONE, BF16, PAGED), (NONE, BF16, PAGED), []),
        (CUDA24, (NONE, FP32, SGD), (INT8, FP32, SGD), ["27.0 of the device's 24.0 GB"]),
        (CUDA24, (INT8, BF16, ADAMW8), (INT8, BF16, ADAMW8), []),
        (OLD_CUDA, (NF4, BF16, ADAMW), (NF4, FP16, ADAMW), ["no bf16 in its hardware"]),
        (BARE_CUDA, (NF4, BF16, PAGED8), (NONE, BF16, ADAMW), ["does not work on cuda"] * 2),
        (MPS, (NF4, BF16, ADAMW), (NONE, BF16, ADAMW), ["does not work on mps"]),
        (MPS, (INT8, FP16, PAGED8), (NONE, BF16, ADAMW), ["fp16 is for CUDA", "does not work on mps", "does not work"]),
        (MPS, (NONE, BF16, PAGED), (NONE, BF16, ADAMW), ["no other memory"]),
        (OLD_MPS, (NONE, BF16, ADAMW), (NONE, FP32, ADAMW), ["no bf16"]),
        (CPU, (NF4, BF16, ADAMW), (NF4, BF16, ADAMW), []),
        (CPU, (INT8, BF16, ADAMW8), (INT8, BF16, ADAMW8), []),
        (CPU, (NF4, FP16, PAGED8), (NF4, BF16, ADAMW8), ["fp16 is for CUDA", "no other memory"]),
        (CPU, (NF4, FP32, PAGED), (NF4, FP32, ADAMW), ["no other memory"]),
        (OLD_CPU, (NF4, BF16, ADAMW), (NF4, FP32, ADAMW), ["the cpu device has no bf16"]),
        (OLD_CPU, (NF4, FP16, ADAMW), (NF4, FP32, ADAMW), ["fp16 is for CUDA, the device is cpu"]),
        (SMALL_CPU, (NONE, BF16, ADAMW), (NF4, BF16, ADAMW), ["13.5 of the device's 8.0 GB"]),
        (BARE_CPU, (NF4, BF16, ADAMW8), (NONE, BF16, ADAMW), ["does not work on cpu", "does not work on cpu"]),
    ],
)
def test_the_table(facts: DeviceFacts, asked: tuple, used: tuple, why: list[str]) -> None:  # type: ignore[type-arg]
    found = plan.decide(Form(*asked), facts, weights)
    assert found.used == Form(*used)
    assert len(found.fallbacks) == len(why), found.fallbacks
    for fallback, text in zip(found.fallbacks, why, strict=True):
        assert text in fallback.why and fallback.asked and fallback.used and fallback.asked != fallback.used
    again = plan.decide(found.used, facts, weights)
    assert (again.used, again.fallbacks) == (found.used, ()), "what was chosen is chosen again"


def test_fallbacks_name_what_they_are_about() -> None:
    told = plan.decide(Form(NF4, FP16, PAGED8), CPU, weights).fallbacks
    assert [(f.asked, f.used) for f in told] == [
        ("compute in FP16", "compute in BF16"),
        ("optimizer PAGED_ADAMW_8BIT", "optimizer ADAMW_8BIT"),
    ]


def test_a_base_that_fits_in_no_form_is_left_as_it_was_asked() -> None:
    """Whoever admits the job refuses it; nothing is bent in vain."""
    tiny = DeviceFacts("cuda", GB, True, True)
    assert plan.decide(Form(NONE, BF16, ADAMW), tiny, weights).fallbacks == ()


def test_what_was_chosen_stands_in_the_spec() -> None:
    spec = trainer_pb2.TrainSpec()
    spec.quantization.method, spec.quantization.double_quantization = NF4, True
    spec.data.step_tokens = 4096
    chosen = trainer_pb2.Chosen(
        quantization=NONE, compute_type=FP32, optimizer=ADAMW8, micro_batch_tokens=512, accumulation=9,
        gradient_checkpointing=True,
    )  # fmt: skip
    plan.stand(spec, chosen)
    assert plan.chosen_of(spec) == chosen and not spec.quantization.double_quantization
    assert plan.form_of(spec) == Form(NONE, FP32, ADAMW8)
