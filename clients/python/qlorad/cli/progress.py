"""How far work is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from qlorad._wire_core import Progress
from qlorad.cli.output import say, terminal


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

        def tell(stage: str, done: int, total: int) -> None:
            bars.update(task, description=f"{what}: {stage}", completed=done, total=total or None)

        yield tell


class Lines:
    """Plain lines: a stage's beginning, its quarters, its end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stage = ""
        self._quarter = -1

    def tell(self, stage: str, done: int, total: int) -> None:
        """Prints a line where something changed that is worth one."""
        quarter = 4 * done // total if total else 0
        if (stage, quarter) == (self._stage, self._quarter):
            return
        self._stage, self._quarter = stage, quarter
        say(f"{self._what}: {stage}" + (f" {done}/{total}" if total else ""))
