"""What moves on a terminal (rich): the line of a job, answers side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from qlorad.cli.watching import step_line
from qlorad.v1 import trainer_pb2 as pb


class JobLine:
    """One line that moves, with news printed above it."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("waiting", total=None)

    def step(self, step: pb.StepMetrics) -> None:
        """Moves the line."""
        self._bars.update(self._task, description=step_line(step), completed=step.step, total=step.total_steps or None)

    def line(self, text: str) -> None:
        """Prints above the line."""
        self._bars.console.print(Text(text))


@contextlib.contextmanager
def job_line() -> Iterator[JobLine]:
    """The line while the block lasts."""
    with Progress(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=Console()) as bars:
        yield JobLine(bars)


class SideBySide:
    """Answers beside one another, growing as they come."""

    def __init__(self, titles: Sequence[str], live: Live) -> None:
        self._titles = list(titles)
        self._texts = ["" for _ in titles]
        self._notes = ["" for _ in titles]
        self._live = live

    def grow(self, index: int, text: str) -> None:
        """More of an answer."""
        self._texts[index] += text
        self._live.update(self.drawn())

    def note(self, index: int, text: str) -> None:
        """A word under an answer."""
        self._notes[index] = text
        self._live.update(self.drawn())

    def drawn(self) -> Table:
        """All answers as they are now."""
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in self._titles:
            grid.add_column(ratio=1)
        grid.add_row(
            *(
                Panel(Text(text), title=Text(title), subtitle=Text(note), title_align="left", subtitle_align="left")
                for title, text, note in zip(self._titles, self._texts, self._notes, strict=True)
            )
        )
        return grid


@contextlib.contextmanager
def side_by_side(titles: Sequence[str]) -> Iterator[SideBySide]:
    """The picture while the block lasts; what it showed last stays."""
    with Live(console=Console(), refresh_per_second=12, vertical_overflow="visible") as live:
        shown = SideBySide(titles, live)
        live.update(shown.drawn())
        yield shown
