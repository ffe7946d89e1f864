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
BUCKET_NUMBERS = 50_000_000
"""Numbers that ranks exchange at a time; DeepSpeed's own choice would take 2 GB of a device for its buffer."""
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


def threads_of(spec: trainer_pb2.TrainSpec) -> int:
    """Of each process: ranks share what the job may have."""
    return max(1, spec.threads // max(1, spec.parallelism.ranks))


def environ_of(spec: trainer_pb2.TrainSpec, extensions: str, device: str = "cpu") -> dict[str, str]:
    """What its environment holds beside the daemon's."""
    threads = str(threads_of(spec))
    environ = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "BITSANDBYTES_NOWELCOME": "1"}
    if spec.parallelism.ranks > 1:
        kind = device.partition(":")[0]
        environ |= {"DS_ACCELERATOR": kind, "TORCH_EXTENSIONS_DIR": extensions, "GLOO_SOCKET_IFNAME": "lo"}
    return environ


def deepspeed_of(spec: trainer_pb2.TrainSpec, device: str = "cpu") -> dict[str, Any]:
    """DeepSpeed's configuration.

    No "optimizer": torch's own is handed over, which also runs where state lies in host memory. No "bf16": trained
    weights are fp32 as in one process, and the frozen base keeps its type. Batches are cut by the recipe, which says
    itself where a step ends.
    """
    ranks, stage = spec.parallelism.ranks, spec.parallelism.zero_stage
    accumulation = max(1, spec.data.accumulation)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": device != "cpu",
        "reduce_bucket_size": BUCKET_NUMBERS,
        "allgather_bucket_size": BUCKET_NUMBERS,
    }
    host = {"device": "cpu", "pin_memory": device != "cpu"}
    if spec.parallelism.offload in (trainer_pb2.OFFLOAD_OPTIMIZER, trainer_pb2.OFFLOAD_ALL):
        zero["offload_optimizer"] = host
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET_NUMBERS
        # Small weights are divided too: what the stage says is what is held.
        zero["stage3_param_persistence_threshold"] = 0
        if spec.parallelism.offload == trainer_pb2.OFFLOAD_ALL:
            zero["offload_param"] = host
    return {
        "train_batch_size": accumulation * ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
