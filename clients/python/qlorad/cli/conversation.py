"""A conversation on a terminal: turns, and the commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qlorad import errors
from qlorad._messages import message
from qlorad.cli.output import Format, emit_error, say

if TYPE_CHECKING:
    from qlorad._messages import Answer
    from qlorad.v1 import messages_pb2

COMMANDS = "/adapter NAME, /base, /reset, /quit"


class Conversation:
    """The turns so far and who answers.

    Promises: a turn that was refused or stopped leaves no trace in what is sent next.
    """

    def __init__(
        self,
        system: str,
        adapter: str,
        answer: Callable[[list[messages_pb2.Message], str], Answer],
        load: Callable[[str], None],
    ) -> None:
        self._first = [message("system", system)] if system else []
        self._turns: list[messages_pb2.Message] = list(self._first)
        self._adapter = adapter
        self._answer = answer
        self._load = load

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until they end or /quit comes."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._say(text)
            except errors.Unavailable:
                raise
            except errors.QloradError as e:
                emit_error(Format.table, e)

    def _say(self, text: str) -> None:
        asked = [*self._turns, message("user", text)]
        try:
            answer = self._answer(asked, self._adapter)
        except KeyboardInterrupt:
            say("\nstopped")
            return
        self._turns = [*asked, message("assistant", answer.text)]

    def _command(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        name = rest.strip()
        if word == "/adapter" and name:
            if name != "base":
                self._load(name)
            self._adapter = name
            say(f"{name} answers")
        elif word == "/base" and not name:
            self._adapter = "base"
            say("the base answers")
        elif word == "/reset" and not name:
            self._turns = list(self._first)
            say("forgotten")
        else:
            say(f"{text!r} is no command; accepted: {COMMANDS}")
