"""What is said to who leaves with Ctrl-C while the daemon makes a dataset: what goes on, and how to come back.

Law of this room: a run belongs to the daemon, so leaving stops nothing; it is
said so, with the name and the request by which the same command finds the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from qlorad._connection import new_request_id
from qlorad._wire_core import Progress
from qlorad.cli.output import say
from qlorad.errors import QloradError
from qlorad.v1 import datasets_pb2


@dataclass(slots=True)
class Making:
    """A dataset on its way, as far as this side knows."""

    alias: str
    request_id: str
    move: bool
    is_asked: bool = False
    """The daemon was asked to make it."""
    _is_begun: bool = False

    def asking(self, tell: Progress) -> Progress:
        """From here on the daemon may be at work; a word of progress proves that it is."""
        self.is_asked = True

        def heard(progress: datasets_pb2.StageProgress) -> None:
            self._is_begun = True
            tell(progress)

        return heard

    def story(self) -> str:
        """What becomes of it when this side leaves."""
        name = f"datasets/{self.alias}"
        if not self.is_asked:
            return f"left before {name} was begun; what was sent is kept for a week. The same command goes on there"
        goes_on = (
            "the daemon goes on making" if self._is_begun else "the daemon may have begun, and then goes on, to make"
        )
        gone = "" if self.move else f", qlorad dataset delete {self.alias} removes it then"
        return (
            f"left; {goes_on} {name}, and nothing stops that but its own end\n"
            f"to come back to it: the same command with --request-id {self.request_id}\n"
            f"qlorad dataset show {self.alias} tells whether it is done{gone}"
        )


@contextlib.contextmanager
def told(alias: str, move: bool, request_id: str) -> Iterator[Making]:
    """While a dataset is made; who leaves in between is told what goes on."""
    making = Making(alias, request_id or new_request_id(), move)
    try:
        yield making
    except KeyboardInterrupt:
        say(f"\n{making.story()}")
        raise


@contextlib.contextmanager
def told_when_made(alias: str, rest: str) -> Iterator[None]:
    """While more is done with a dataset that is there: whoever leaves, or meets an error, is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nleft; datasets/{alias} is made. For the rest: {rest}")
        raise
    except QloradError:
        say(f"datasets/{alias} is made all the same. For the rest: {rest}")
        raise
