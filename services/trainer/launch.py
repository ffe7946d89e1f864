"""How an attempt is started: order, arguments, environment, DeepSpeed's configuration.

Law of this room: pure. Everything a worker is told is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlorad.v1 import trainer_pb2
from services.common.facts import ModelFacts
from services.common.frames.v1 import training_pb2
from services.trainer import jobs, retention, slots

SOLO = "services.trainer.worker.train"
RANKS = "services.trainer.worker.ranks"
FACTS = "facts"
ORDER = "order.pb"
LOG = "log"
LOCK = "worker.lock"
STOP = "cancel"
"""The wish to stop, be it to cancel or to pause. Its name on disk is that of its first use: workers outlive daemons."""
RESERVE = "reserve"
"""Space kept back for a worker's last word on a full disk."""
LOGITS_BYTES = 8 << 20
"""Of logits in fp32 that a worker holds at a time."""


def order_of(
    record: training_pb2.JobRecord, store: str, devices: Sequence[str], heartbeat_seconds: float, now_seconds: float
) -> training_pb2.Order:
    """What the worker of the job's present attempt is to do."""
    job = record.job
    order = training_pb2.Order(
        job=job.name.removeprefix("jobs/"),
        attempt=job.attempt,
        spec=job.spec.train,
        store=store,
        device=slots.torch_name(devices[0]),
        devices=[slots.torch_name(d) for d in devices],
        heartbeat_seconds=heartbeat_seconds,
        checkpoint_digest=jobs.resume_from(record).digest,
        evaluated_step=record.evaluated_step,
    )
    best = retention.best(record.marks)
    if job.spec.train.evaluation.keep_best_adapter and best is not None:
        order.best_checkpoint_digest = best.digest
    allowed = job.spec.train.limits.max_seconds
    if allowed:
        order.seconds_left = max(0.0, allowed - jobs.seconds_at_work(record, now_seconds))
    return order


def module_of(spec: trainer_pb2.TrainSpec) -> str:
    """Which program runs it."""
    return RANKS if spec.parallelism.ranks > 1 else SOLO


def weight_bytes(model: ModelFacts, spec: trainer_pb2.TrainSpec) -> int:
    """About what the base's weights take."""
    if spec.quantization.method == trainer_pb2.QUANTIZATION_METHOD_NF4:
        return model.nf4_bytes
    if spec.quantization.method == trainer_pb2.QUANTIZATION_METHOD_INT8:
        return 2 * model.parameters - _linear_weights(model)
    return model.parameters * (4 if spec.quantization.compute_type == trainer_pb2.COMPUTE_TYPE_FP32 else 2)


def _linear_weights(model: ModelFacts) -> int:
    """About how many weights are quantised: NF4 takes half a byte for them, their scales a little, the rest two."""
    return max(0, round((2 * model.parameters - model.nf4_bytes) / (2 - 0.516)))


def environ_of(spec: trainer_pb2.TrainSpec, extensions: str) -> dict[str, str]:
    """What its environment holds beside the daemon's."""
    threads = str(1 if spec.parallelism.ranks > 1 else spec.threads)
    environ = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "BITSANDBYTES_NOWELCOME": "1"}
    if spec.parallelism.ranks > 1:
        environ |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": extensions, "GLOO_SOCKET_IFNAME": "lo"}
    return environ


def deepspeed_of(spec: trainer_pb2.TrainSpec) -> dict[str, Any]:
    """DeepSpeed's configuration; no "optimizer": torch's AdamW is handed over."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": spec.data.accumulation,
        "gradient_clipping": spec.optimizer.max_grad_norm,
        "zero_optimization": {"stage": spec.parallelism.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
