"""P19's gate: nothing in the tree unpickles, evaluates or trusts code that came from outside.

Law of this room: reads files, imports none of them.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

PICKLES = (
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "cloudpickle",
    "jsonpickle",
)
EVALUATES = ("eval", "exec", "compile", "execfile")
WHERE = ("services", "clients", "benchmarks", "examples", "protos")


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and what is wrong there."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {n}") for n in names if n.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            told = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            last = told.rpartition(".")[2]
            if told in EVALUATES:
                yield node.lineno, f"calls {told}"
            if told in ("torch.load", "jit.load", "torch.jit.load") and given.get("weights_only") != "True":
                yield node.lineno, f"{told} without weights_only=True"
            if given.get("trust_remote_code", "False") != "False":
                yield node.lineno, "trust_remote_code"
            if given.get("allow_pickle", "False") != "False":
                yield node.lineno, "allow_pickle"
            if told in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"):
                yield node.lineno, told
            if last in ("Unpickler",) or (last == "system" and told == "os.system"):
                yield node.lineno, told
            if given.get("shell") == "True":
                yield node.lineno, "shell=True"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                trusted = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if trusted and ast.unparse(value) != "False":
                    yield node.lineno, "trust_remote_code"


def walk(root: pathlib.Path) -> tuple[int, list[str]]:
    """How many files were read, and every danger in them."""
    count, found = 0, []
    for top in WHERE:
        for path in sorted((root / top).rglob("*.py")):
            if "node_modules" in path.parts:
                continue
            count += 1
            text = path.read_text()
            found += [f"{path.relative_to(root)}:{line}: {what}" for line, what in dangers(ast.parse(text))]
    return count, found
