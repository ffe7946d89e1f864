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

COMMANDS = "/adapter NAME, /base, /compare A B, /reset, /help, /quit"
HELP = """/adapter NAME   NAME answers from now on; what was said stays
/base           the base answers from now on
/compare A B    A and B answer side by side from now on; A's answers go on in the conversation
/reset          forgets what was said
/quit           ends; so does Ctrl-D
Ctrl-C          stops an answer"""


class Conversation:
    """The turns so far and who answers.

    Promises: a turn that was refused or stopped leaves no trace in what is sent next.
    """

    def __init__(
        self,
        system: str,
        adapter: str,
        answer: Callable[[list[messages_pb2.Message], str], Answer],
        beside: Callable[[list[messages_pb2.Message], list[str]], list[Answer]],
        load: Callable[[str], None],
    ) -> None:
        self._first = [message("system", system)] if system else []
        self._turns: list[messages_pb2.Message] = list(self._first)
        self._voices = [adapter]
        self._answer = answer
        self._beside = beside
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
            if len(self._voices) == 1:
                answer = self._answer(asked, self._voices[0])
            else:
                answer = self._beside(asked, self._voices)[0]
        except KeyboardInterrupt:
            say("\nstopped")
            return
        if answer.failed is None:
            self._turns = [*asked, message("assistant", answer.text)]

    def _command(self, text: str) -> None:
        word, *rest = text.split()
        if word == "/adapter" and len(rest) == 1:
            self._choose(rest)
            say(f"{rest[0]} answers")
        elif word == "/base" and not rest:
            self._voices = ["base"]
            say("the base answers")
        elif word == "/compare" and len(rest) >= 2 and len(set(rest)) == len(rest):
            self._choose(rest)
            say(f"{' and '.join(rest)} answer; {rest[0]} goes on")
        elif word == "/reset" and not rest:
            self._turns = list(self._first)
            say("forgotten")
        elif word == "/help" and not rest:
            say(HELP)
        else:
            say(f"{text!r} is no command; accepted: {COMMANDS}")

    def _choose(self, names: list[str]) -> None:
        for name in names:
            if name != "base":
                self._load(name)
        self._voices = names
