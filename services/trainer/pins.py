"""What live jobs need is kept from removal.

Law of this room: a job's holds are those of its record: model, dataset, ledger,
kept checkpoints. The worker inherits those of model and dataset, so they
outlive the daemon with it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.common.shelf import Pin, Shelf

log = logging.getLogger("qlorad.trainer")


def needed(record: training_pb2.JobRecord) -> Iterator[str]:
    """Digests that a job must find on the shelf."""
    train = record.job.spec.train
    yield train.model.removeprefix("models/")
    yield train.dataset.removeprefix("datasets/")
    if record.ledger_digest:
        yield record.ledger_digest
    yield from (m.digest for m in record.marks)


class Pins:
    """The holds of every live job. Blocking; safe from several threads."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._held: dict[str, dict[str, Pin]] = {}
        self._lock = threading.Lock()

    def hold_first(self, record: training_pb2.JobRecord, key: str) -> None:
        """Holds for a job that is not on disk yet, under a key of its own; NOT_FOUND if something is gone."""
        self._hold(record, key, strict=True)

    def take_over(self, key: str, job: str) -> None:
        """The job is on disk: its first holds become its own."""
        with self._lock:
            own = self._held.setdefault(job, {})
            for digest, pin in self._held.pop(key, {}).items():
                if digest in own:
                    pin.release()
                else:
                    own[digest] = pin

    def hold_for(self, record: training_pb2.JobRecord) -> None:
        """Makes the holds equal to what the job needs; what is gone is logged."""
        self._hold(record, record.job.name.removeprefix("jobs/"), strict=False)

    def _hold(self, record: training_pb2.JobRecord, job: str, strict: bool) -> None:
        wanted = dict.fromkeys(needed(record))
        with self._lock:
            held = self._held.setdefault(job, {})
            for digest in wanted:
                if digest in held:
                    continue
                try:
                    held[digest] = self._shelf.pin(digest, record.job.name)
                except Fault as fault:
                    if strict:
                        self._release(job)
                        raise
                    log.error("%s needs what is gone: %s", record.job.name, fault)
            for digest in held.keys() - wanted.keys():
                held.pop(digest).release()

    def fds(self, order: training_pb2.Order) -> list[int]:
        """File descriptors that keep what a worker reads in whoever inherits them.

        Not those of checkpoints: only this daemon removes them, and it must be able to.
        """
        read = {order.spec.model.removeprefix("models/"), order.spec.dataset.removeprefix("datasets/")}
        with self._lock:
            return [pin.fd for digest, pin in self._held.get(order.job, {}).items() if digest in read]

    def release(self, job: str) -> None:
        """Ends a job's holds."""
        with self._lock:
            self._release(job)

    def _release(self, job: str) -> None:
        for pin in self._held.pop(job, {}).values():
            pin.release()

    def hand_over(self) -> None:
        """Closes this process's copies; what a worker inherited goes on being held by it."""
        with self._lock:
            for held in self._held.values():
                for pin in held.values():
                    os.close(pin.fd)
            self._held.clear()
