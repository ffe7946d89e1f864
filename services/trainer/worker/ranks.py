"""Several processes for one job: starts the ranks, and ends them all when one is lost.

Law of this room: ranks inherit the attempt's lock and the device lease, so both
are held until the last of them is gone. (torchrun closes inherited descriptors,
and its ranks outlive a killed agent; so the ranks are started here.) They meet
over a file in the attempt's folder, so no port is needed.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

from services.common import process
from services.common.frames.v1 import training_pb2
from services.common.shelf import write_durable
from services.trainer import pulse
from services.trainer.worker.facts import Teller
from services.trainer.worker.train import read_arguments, run

RANK = "QLORAD_RANK"
FAILURE = "failed-"
LOOK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def clear_stale_locks(extensions: str) -> None:
    """Removes locks of builds that were killed: the next loader would wait for ever.

    Locks younger than ten minutes may belong to a build under way.
    """
    for lock in pathlib.Path(extensions).glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            lock.unlink(missing_ok=True)


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the one that started it is gone, also if that was before this call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class RankTeller(Teller):
    """Lays its failure beside the facts: whether it is the cause, or only saw another rank go, the leader knows."""

    def __init__(self, attempt: pathlib.Path, rank: int, heartbeat_seconds: float) -> None:
        super().__init__(attempt, rank == 0, heartbeat_seconds, f"{pulse.SIGN}.{rank}")
        self._failure = attempt / f"{FAILURE}{rank}"

    def tell(self, fact: training_pb2.Fact) -> None:
        if not fact.HasField("failed"):
            return super().tell(fact)
        fact.time.FromNanoseconds(time.time_ns())
        write_durable(self._failure, fact.SerializeToString())


def outcome(codes: list[int | None], failures: list[training_pb2.Fact]) -> tuple[str, training_pb2.Fact | None]:
    """How ranks ended together, once one has failed: a line for people, and the failure to tell.

    A rank that was killed is a loss, whatever the others say of it: nothing is told, and the job begins anew from its
    checkpoint. Else the first failure is the cause; the others may only have missed that rank. Rank 0 tells of its
    own ending where it came to one.
    """
    lost = [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    if lost:
        told = ", ".join(f"rank {rank} was ended by signal {number}" for rank, number in lost)
        return f"{told}; the others are ended too", None
    if codes[0] == 0 or not failures:
        return "", None
    return "", min(failures, key=lambda f: f.time.ToNanoseconds())


def lead(attempt: pathlib.Path, order: training_pb2.Order, hold: str) -> int:
    """Starts every rank and waits; the first to fail ends the others."""
    teller = Teller(attempt)
    teller.tell(training_pb2.Fact(started=training_pb2.WorkerStarted(pid=os.getpid())))
    clear_stale_locks(os.environ["TORCH_EXTENSIONS_DIR"])
    world = order.spec.parallelism.ranks
    tools = str(pathlib.Path(sys.executable).parent)  # ninja may lie beside this Python alone
    fds = tuple(int(n) for n in hold.split(",") if n)
    ranks = []
    for rank in range(world):
        environ = {
            **os.environ,
            "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
            RANK: str(rank),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            # No port is opened: DeepSpeed names its shared memory by these.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(os.getpid()),
        }
        argv = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        ranks.append(subprocess.Popen(argv, env=environ, pass_fds=fds))
    while True:
        codes = [r.poll() for r in ranks]
        if any(codes) or all(c == 0 for c in codes):
            break
        time.sleep(LOOK_SECONDS)
    codes = [r.poll() for r in ranks]  # again: who failed because another was lost is seen after the loss
    for r in ranks:
        r.kill()
        r.wait()
    if not any(codes):
        return 0
    written = sorted(attempt.glob(f"{FAILURE}*"))
    line, failure = outcome(codes, [training_pb2.Fact.FromString(path.read_bytes()) for path in written])
    if line:
        teller.say(line, "ERROR")
    if failure is not None:
        teller.tell(failure)
    return next(c for c in codes if c)


def follow(attempt: pathlib.Path, order: training_pb2.Order, rank: int) -> int:
    """One rank: joins the others, then the same recipe."""
    die_with_parent(int(os.environ["MASTER_PORT"]))
    teller = RankTeller(attempt, rank, order.heartbeat_seconds)
    if rank < len(order.devices):
        order.device = order.devices[rank]
    warnings.filterwarnings("ignore")
    import deepspeed

    deepspeed.init_distributed(
        "nccl" if order.device.startswith("cuda") else "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{attempt / 'rendezvous'}",
        rank=rank,
        world_size=order.spec.parallelism.ranks,
    )
    return run(order, teller)


def main() -> None:
    process.apply_limits()
    attempt, order, hold = read_arguments()
    rank = os.environ.get(RANK)
    code = lead(attempt, order, hold) if rank is None else follow(attempt, order, int(rank))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if code >= 0 else 1)


if __name__ == "__main__":
    main()
