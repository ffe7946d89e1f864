"""Which checkpoints stay, whatever is sealed and evaluated in whatever order."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer import jobs, launch, retention

LOSS = st.one_of(st.none(), st.integers(1, 6).map(float), st.just(math.nan))


@given(
    st.lists(st.tuples(st.integers(1, 4), LOSS), min_size=1, max_size=25),
    st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, 2, 5]), st.booleans(),
)  # fmt: skip
def test_the_newest_and_the_needed_stay_and_nothing_that_the_rules_do_not_name(
    sealed: list[tuple[int, float | None]], last: int, best: int, every: int, needs_best: bool
) -> None:
    record = training_pb2.JobRecord()
    train = record.job.spec.train
    train.checkpoints.keep_last, train.checkpoints.keep_best = last, best
    train.checkpoints.keep_every_steps, train.evaluation.keep_best_adapter = every, needs_best
    step, whole = 0, list[training_pb2.Mark]()
    for number, (more, loss) in enumerate(sealed, start=1):
        step += more
        mark = training_pb2.Mark(step=step, digest=f"sha256:{step}")
        event = trainer_pb2.CheckpointSealed(step=step, digest=mark.digest)
        if loss is not None:
            mark.eval_loss = event.eval_loss = loss
        whole.append(mark)
        record = jobs.fold(record, trainer_pb2.Event(sequence=number, checkpoint_sealed=event))

        kept = [m.step for m in record.marks]
        assert kept == sorted(kept) and kept[-1] == step == jobs.resume_from(record).step, "the newest is always there"
        assert set(kept) >= {m.step for m in whole[-max(1, last) :]}
        told = sorted((m.eval_loss, m.step) for m in whole if m.HasField("eval_loss") and m.eval_loss == m.eval_loss)
        ranked = [s for _, s in told]
        assert set(kept) >= set(ranked[:best])
        if needs_best and ranked:
            order = launch.order_of(record, "/", ["cpu"], 0.0, 0.0)
            assert ranked[0] in kept and order.best_checkpoint_digest == f"sha256:{ranked[0]}"
        named = {m.step for m in whole[-max(1, last) :]} | set(ranked[: max(best, needs_best)])
        named |= {m.step for m in whole if every and m.step % every == 0}
        assert set(kept) == named, "one after another is as all at once"


def test_where_nothing_was_evaluated_there_is_no_best() -> None:
    assert retention.best([training_pb2.Mark(step=3)]) is None
