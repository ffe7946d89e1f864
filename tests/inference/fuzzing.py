"""`python -m tests.inference.fuzzing NAME [libFuzzer's flags]`: one reader under atheris.

Ends with another code than 0 where a reader raises what it must not, hangs, or grows. What was found lies in the
folder that the flag -artifact_prefix names.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["services", "tests.inference.parsers"]):
    from tests.inference.parsers import PARSERS


def main() -> None:
    name = sys.argv.pop(1)
    parse = PARSERS[name]()
    atheris.Setup(sys.argv, parse)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
