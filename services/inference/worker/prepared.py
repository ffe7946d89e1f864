"""Quantised weights of a base, kept so that the next load need not quantise anew.

Law of this room: what is kept belongs to one base, one precision and the libraries that made it; it is written
aside, described by a manifest, renamed into place, and held against its digests before each use. What is not
whole is thrown away and made anew: the sealed model is the truth, this is only time saved. What is used has a
lock until the process ends; `services.inference.kept` says what stays on disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Callable

import torch

from qlorad.v1 import artifacts_pb2
from services.common import artifacts
from services.common.errors import Fault
from services.inference import kept

log = logging.getLogger("qlorad.engine")

_KIND = artifacts_pb2.ARTIFACT_KIND_MODEL


class Prepared:
    """One base in one precision under a folder, all of which together stay within `limit` bytes (0 = no bound).

    Keeps nothing if there is no folder.
    """

    def __init__(self, folder: str, digest: str, precision: str, limit: int = 0) -> None:
        # How weights of few bits are laid out also depends on what the processor can do.
        name = kept.name_of(digest, precision, torch.backends.cpu.get_cpu_capability())
        self._place = pathlib.Path(folder) / name if folder else None
        self._limit = limit
        self._held: int | None = None
        """Open for as long as this process may have the files in its memory."""

    def find(self) -> pathlib.Path | None:
        """The folder of weights that are there and whole, else None."""
        if self._place is None or (held := kept.hold(self._place)) is None:
            return None
        self._held = held
        try:
            manifest = artifacts.read_manifest(self._place / artifacts.MANIFEST)
            artifacts.verify_payload(manifest, self._place / artifacts.PAYLOAD)
        except (Fault, OSError) as error:
            self.drop(error)
            return None
        with contextlib.suppress(OSError):
            os.utime(self._place)
        return self._place / artifacts.PAYLOAD

    def keep(self, write: Callable[[pathlib.Path], None]) -> None:
        """Keeps what `write` puts into a folder. A full disk, or another who was first, is no error."""
        if self._place is None:
            return
        aside, mine = kept.aside(self._place), None
        try:
            payload = aside / artifacts.PAYLOAD
            payload.mkdir(parents=True)
            mine = kept.hold(aside)
            write(payload)
            manifest = artifacts.make_manifest(_KIND, payload, {})
            (aside / artifacts.MANIFEST).write_bytes(artifacts.write_manifest(manifest))
            size = kept.size_of(aside)
            if not kept.make_room(self._place.parent, size, self._limit):
                log.info("quantised weights are not kept: %d bytes; accepted: %d in all", size, self._limit)
                return
            aside.rename(self._place)
        except Exception as error:  # whatever writing them raises: they only save time
            log.warning("quantised weights are not kept: %s", error)
        finally:
            if mine is not None:
                os.close(mine)
            shutil.rmtree(aside, ignore_errors=True)

    def drop(self, why: Exception) -> None:
        """Throws away what cannot be used."""
        log.warning("kept weights cannot be used, and are made anew: %s", why)
        if self._held is not None:
            os.close(self._held)
            self._held = None
        if self._place is not None:
            kept.remove(self._place)
