"""The repairs that may be asked for.

Law of this room: pure; names and what each does. A worker does them, in this
order, only where they were asked for, and tells of each.
"""

from __future__ import annotations

from collections.abc import Mapping

NUL_CHARACTERS = "nul_characters"
LONE_SURROGATES = "lone_surrogates"
ROLE_NAMES = "role_names"
LINE_ENDS = "line_ends"
BYTE_ORDER_MARKS = "byte_order_marks"
CONTROL_CHARACTERS = "control_characters"
MOJIBAKE = "mojibake"
BLANKS = "blanks"
EMPTY_TURNS = "empty_turns"
JOIN_TURNS = "join_turns"
TRAILING_TURN = "trailing_turn"

REPAIRS: Mapping[str, str] = {
    NUL_CHARACTERS: "takes NUL out of texts",
    LONE_SURROGATES: "takes halves of surrogate pairs out of texts",
    ROLE_NAMES: "reads role names that others use, as in human, gpt or developer, as user, assistant or system",
    LINE_ENDS: "makes one LF of CR LF, and of CR alone",
    BYTE_ORDER_MARKS: "takes byte order marks out of texts",
    CONTROL_CHARACTERS: "takes control characters out of texts; tabs and line ends stay",
    MOJIBAKE: "reads UTF-8 that was taken for Latin-1 as what it was, where that is certain",
    BLANKS: "takes blanks and empty lines from the ends of turns",
    EMPTY_TURNS: "takes turns out that say and call nothing, where the others stay in order",
    JOIN_TURNS: "joins turns of one speaker that follow each other, with an empty line between them",
    TRAILING_TURN: "takes out the user's last turns that nobody answers",
}
"""What each does, for people."""

FOREIGN_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "person", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai", "model", "llm"), "assistant"),
    **dict.fromkeys(("developer", "sys"), "system"),
    **dict.fromkeys(("observation", "ipython", "tool_response"), "tool"),
    **{role: role for role in ("user", "assistant", "system", "tool")},
}


def role_of(name: object) -> str | None:
    """The role that a name means, however it is written; None where that is not certain."""
    return FOREIGN_ROLES.get(name.strip().lower()) if isinstance(name, str) else None
