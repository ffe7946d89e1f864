"""Text for starter models: the Python standard library of this very interpreter.

Law of this room: the same Python patch version gives the same text. Files are
taken in an order that depends on their names alone, from folders that every
packaging of Python ships, up to a fixed number of characters.
"""

import ast
import hashlib
import pathlib
import sysconfig
import warnings

FOLDERS = (
    "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
_OF_THE_BUILD = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize")
_FILE_LIMIT = 24_000  # so that no single file is most of the text
_CHAT_SHARE = 0.25
_REPLY_LIMIT = 900


def files() -> list[pathlib.Path]:
    """Paths of the sources, in an order drawn from their names."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.glob("*.py") if not p.name.startswith(_OF_THE_BUILD)]
    for folder in FOLDERS:
        found += (root / folder).rglob("*.py")
    return sorted(found, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def texts(budget: int) -> list[str]:
    """Documents of `budget` characters in all: source files, and short chats made from their functions.

    The chats keep the tokens of the chat template alive in the embedding.
    """
    plain: list[str] = []
    chats: list[str] = []
    plain_left, chat_left = int(budget * (1 - _CHAT_SHARE)), int(budget * _CHAT_SHARE)
    for path in files():
        source = path.read_text(encoding="utf-8", errors="strict").replace("\r\n", "\n")
        if plain_left > 0:
            plain.append(source[: min(_FILE_LIMIT, plain_left)])
            plain_left -= len(plain[-1])
        for chat in chats_of(source):
            if chat_left <= 0:
                break
            chats.append(chat[:])
            chat_left -= len(chat)
        if plain_left <= 0 and chat_left <= 0:
            break
    return plain + chats


def chats_of(source: str) -> list[str]:
    """A question and an answer for each short documented function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    made = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        code = ast.unparse(node)
        if len(code) <= _REPLY_LIMIT:
            first = doc.strip().splitlines()[0]
            made.append(chat(f"Write the function {node.name}. {first}", code))
    return made


def chat(question: str, answer: str) -> str:
    """One turn each, as the starter's template renders them."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
