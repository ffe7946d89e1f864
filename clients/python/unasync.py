"""Makes the plain client from the asyncio one, word by word.

    python clients/python/unasync.py [--check]

Law of this room: the logic of the client is written once, under qlorad/aio;
these words are all that differs. `--check` writes nothing and fails if a plain
module is not what it would be made into.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent / "qlorad"
MODULES = ("client", "datasets", "models", "adapters", "jobs", "inference")
WORDS = (
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bqlorad\.aio\b", "qlorad"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\b__aenter__\b", "__enter__"),
    (r"\b__aexit__\b", "__exit__"),
    (r"if TYPE_CHECKING:\n    from \S+ import \w+AsyncStub\n", ""),
    (r"\b(\w+)AsyncStub\b", r"\1Stub"),
)


def plain(name: str) -> str:
    """The text of the plain module of a name."""
    text = (PACKAGE / "aio" / f"{name}.py").read_text()
    for word, instead in WORDS:
        text = re.sub(word, instead, text)
    head, quote, rest = text.partition('"""\n')
    made = f"Made from aio/{name}.py by clients/python/unasync.py; change that file."
    loops = "\n# ruff: noqa: UP028\n" if re.search(r"\byield\b", rest) else ""
    return f"{head}\n\n{made}\n{quote}{loops}{rest}"


def tidy(text: str, target: pathlib.Path, *ruff: str) -> str:
    """The text as ruff would have it."""
    command = [sys.executable, "-m", "ruff", *ruff, "--stdin-filename", str(target), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Writes the plain modules, or checks them."""
    stale = []
    for name in MODULES:
        target = PACKAGE / f"{name}.py"
        made = tidy(
            tidy(plain(name), target, "check", "-q", "--select", "I,F401,UP028,RUF100", "--fix"), target, "format"
        )
        if not target.exists() or target.read_text() != made:
            stale.append(str(target))
            if "--check" not in sys.argv[1:]:
                target.write_text(made)
    if stale and "--check" in sys.argv[1:]:
        raise SystemExit("stale, run clients/python/unasync.py: " + ", ".join(stale))


if __name__ == "__main__":
    main()
