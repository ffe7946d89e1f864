"""A job from its creation to its adapter, through the door."""

from __future__ import annotations

from qlorad.v1 import trainer_pb2
from tests.house import House
from tests.trainer.kit import adapter_config, create, facts, get, small, stub_of, watch


def test_a_job_trains_and_seals_its_adapter(trainer: House) -> None:
    stub = stub_of(trainer)
    job = create(stub, small(adapter="adapters/made", evaluation__every_steps=2), "one", labels={"a": "b"})
    assert job.state == trainer_pb2.JOB_STATE_QUEUED and not job.is_terminal
    assert job.spec.train.model.startswith("models/sha256:") and job.spec.train.dataset.startswith("datasets/sha256:")
    events = list(watch(stub, job.name))
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    done = get(stub, job.name)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED, done
    told = facts(events)
    states = [f for f in told if f.isupper()]
    assert states == ["QUEUED", "PREPARING", "RUNNING", "FINALIZING", "SUCCEEDED"]
    assert [e.step.step for e in events if e.HasField("step")] == [1, 2, 3, 4]
    assert [e.evaluated.step for e in events if e.HasField("evaluated")] == [0, 2, 4]
    assert [e.checkpoint_sealed.step for e in events if e.HasField("checkpoint_sealed")] == [2, 4]
    assert done.end == trainer_pb2.END_REASON_STEPS and done.last_sequence == len(events)
    assert done.result.adapter == "adapters/made" and done.result.eval_loss_after < done.result.eval_loss_before
    assert done.result.steps == 4 and done.result.tokens == sum(e.step.tokens for e in events)
    assert adapter_config(trainer.home, done.result.adapter_digest)["target_modules"] == ["q_proj", "v_proj"]
