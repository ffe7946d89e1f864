"""Jobs on a CUDA device (`make test-gpu`): forms of the base, optimisers, a kill, what is told of memory."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Iterator

import pytest

from qlorad.v1 import trainer_pb2
from services.common import process
from tests.house import House, clone_store, house
from tests.trainer.kit import create, get, seal_dataset, small, stub_of, watch, worker_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
STEPS = 12
FORMS = {
    "nf4, bf16": ("QUANTIZATION_METHOD_NF4", "COMPUTE_TYPE_BF16", "OPTIMIZER_KIND_ADAMW"),
    "nf4, fp16, paged 8-bit": ("QUANTIZATION_METHOD_NF4", "COMPUTE_TYPE_FP16", "OPTIMIZER_KIND_PAGED_ADAMW_8BIT"),
    "int8, bf16, 8-bit": ("QUANTIZATION_METHOD_INT8", "COMPUTE_TYPE_BF16", "OPTIMIZER_KIND_ADAMW_8BIT"),
    "bf16, paged": ("QUANTIZATION_METHOD_NONE", "COMPUTE_TYPE_BF16", "OPTIMIZER_KIND_PAGED_ADAMW"),
    "fp32": ("QUANTIZATION_METHOD_NONE", "COMPUTE_TYPE_FP32", "OPTIMIZER_KIND_ADAMW"),
}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory, starter_home: pathlib.Path) -> Iterator[House]:
    """A trainer on the first CUDA device."""
    at = tmp_path_factory.mktemp("card") / "home"
    clone_store(starter_home, at)
    seal_dataset(at, "small", {"train": 24, "validation": 4})
    with house(at) as made:
        made.start("trainer", "--devices", "cuda:0", "--retry-backoff-seconds", "0")
        yield made


@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_as_it_was_asked(card: House, form: str) -> None:
    method, compute, optimizer = FORMS[form]
    spec = small(STEPS)
    spec.train.quantization.method = trainer_pb2.QuantizationMethod.Value(method)
    spec.train.quantization.double_quantization = method.endswith("NF4")
    spec.train.quantization.compute_type = trainer_pb2.ComputeType.Value(compute)
    spec.train.optimizer.kind = trainer_pb2.OptimizerKind.Value(optimizer)
    job = create(stub_of(card), spec, form)
    events = list(watch(stub_of(card), job.name))
    ended = get(stub_of(card), job.name)
    assert ended.state == trainer_pb2.JOB_STATE_SUCCEEDED, ended.error
    assert not [e for e in events if e.HasField("fallback")], "the device can do all of it"
    steps = [e.step for e in events if e.HasField("step") and not e.step.skipped]
    assert steps[-1].loss < steps[0].loss and all(s.device_memory_bytes > 0 for s in steps)
    assert ended.result.eval_loss_after < ended.result.eval_loss_before
    assert (steps[0].loss_scale > 1) == compute.endswith("FP16")


def test_a_killed_worker_goes_on_where_it_was(card: House) -> None:
    stub = stub_of(card)
    job = create(stub, small(40), "killed")
    after = 0
    for event in watch(stub, job.name):
        after = event.sequence
        if event.HasField("checkpoint_sealed"):
            process.kill(worker_of(card.home, job.name), signal.SIGKILL)
            break
    begun = [e.attempt_started for e in watch(stub, job.name, after) if e.HasField("attempt_started")]
    assert get(stub, job.name).state == trainer_pb2.JOB_STATE_SUCCEEDED
    assert len(begun) == 1 and begun[0].from_step >= 2
