"""Quantised weights of a base, kept so that the next load need not quantise anew.

Law of this room: what is kept belongs to one base, one precision and the libraries that made it; it is written
aside, described by a manifest, renamed into place, and held against its digests before each use. What is not
whole is thrown away and made anew: the sealed model is the truth, this is only time saved.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pathlib
import shutil
from collections.abc import Callable

import torch

from qlorad.v1 import artifacts_pb2
from services.common import artifacts
from services.common.errors import Fault

log = logging.getLogger("qlorad.engine")

_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_KIND = artifacts_pb2.ARTIFACT_KIND_MODEL


class Prepared:
    """One base in one precision under a folder; keeps nothing if there is no folder."""

    def __init__(self, folder: str, digest: str, precision: str) -> None:
        versions = "-".join(importlib.metadata.version(name) for name in _LIBRARIES)
        # How weights of few bits are laid out also depends on what the processor can do.
        name = f"{digest.removeprefix('sha256:')}-{precision}-{versions}-{torch.backends.cpu.get_cpu_capability()}"
        self._place = pathlib.Path(folder) / name.lower().replace("+", "_") if folder else None

    def find(self) -> pathlib.Path | None:
        """The folder of weights that are there and whole, else None."""
        if self._place is None or not self._place.exists():
            return None
        try:
            manifest = artifacts.read_manifest(self._place / artifacts.MANIFEST)
            artifacts.verify_payload(manifest, self._place / artifacts.PAYLOAD)
        except (Fault, OSError) as error:
            self.drop(error)
            return None
        return self._place / artifacts.PAYLOAD

    def keep(self, write: Callable[[pathlib.Path], None]) -> None:
        """Keeps what `write` puts into a folder. A full disk, or another who was first, is no error."""
        if self._place is None:
            return
        aside = self._place.with_name(f".aside-{os.getpid()}")
        try:
            payload = aside / artifacts.PAYLOAD
            payload.mkdir(parents=True)
            write(payload)
            manifest = artifacts.make_manifest(_KIND, payload, {})
            (aside / artifacts.MANIFEST).write_bytes(artifacts.write_manifest(manifest))
            aside.rename(self._place)
        except Exception as error:  # whatever writing them raises: they only save time
            log.warning("quantised weights are not kept: %s", error)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def drop(self, why: Exception) -> None:
        """Throws away what cannot be used."""
        log.warning("kept weights cannot be used, and are made anew: %s", why)
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)
