"""How far work is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlorad._wire_core import Progress
from qlorad.cli.output import say, terminal

if TYPE_CHECKING:
    from qlorad.v1 import datasets_pb2


@contextlib.contextmanager
def shown(what: str) -> Iterator[Progress]:
    """A callback for (stage, done, total) while the block lasts."""
    if not terminal(sys.stderr):
        yield Lines(what).tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)

        def tell(progress: datasets_pb2.StageProgress) -> None:
            described = f"{what}: {progress.stage}{_loss(progress)}"
            bars.update(task, description=described, completed=progress.done, total=progress.total or None)

        yield tell


class Lines:
    """Plain lines: a stage's beginning, its quarters, its end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stage = ""
        self._quarter = -1

    def tell(self, progress: datasets_pb2.StageProgress) -> None:
        """Prints a line where something changed that is worth one."""
        quarter = 4 * progress.done // progress.total if progress.total else 0
        if (progress.stage, quarter) == (self._stage, self._quarter):
            return
        self._stage, self._quarter = progress.stage, quarter
        far = f" {progress.done}/{progress.total}" if progress.total else ""
        say(f"{self._what}: {progress.stage}{far}{_loss(progress)}")


def _loss(progress: datasets_pb2.StageProgress) -> str:
    return f", loss {progress.loss:.3f}" if progress.HasField("loss") else ""
