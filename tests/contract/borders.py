"""The borders of the house, as a walk over the syntax of every file. See "Who may import whom" in ARCHITECTURE.md.

Law of this room: reads files, imports none of them. A breach is one line that
names rule, file, line and what crossed.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

SERVICES = ("datasets", "registry", "trainer", "inference")
TORCH = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "chromadb")
GRPC_FILES = ("servicer.py", "app.py", "__main__.py")
GRPC_COMMON = ("services/common/server.py", "services/common/interceptors.py")
PURE = (
    "services/common/errors.py",
    "services/common/facts.py",
    "services/common/names.py",
    "services/common/prompt/rows.py",
    "services/inference/adapters.py",
    "services/inference/messages.py",
    "services/trainer/estimate.py",
    "services/trainer/jobs.py",
    "services/trainer/launch.py",
    "services/trainer/spec.py",
)
IMPURE = (
    *("os", "io", "sys", "time", "random", "secrets", "uuid", "socket", "subprocess", "shutil", "tempfile", "sqlite3"),
    *("asyncio", "threading", "multiprocessing", "signal", "fcntl", "urllib.request", "http", "glob", "mmap"),
)
CLOCKS = ("now", "utcnow", "today", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink")
PLUGINS = ("importlib.metadata.EntryPoint", "importlib.import_module", "runpy", "pkg_resources", "pkgutil")
"""What loads code by name."""
LOADED = "load"
"""How an entry point is loaded; only finding it, and asking for versions, is free to all."""
STATEFUL = (
    *("Lock", "Queue", "Event", "Counter", "Gauge", "Histogram", "Semaphore", "Thread", "Pool", "Registry", "deque"),
    *("defaultdict", "OrderedDict", "open", "list", "set", "bytearray", "connect", "socket", "local"),
)
"""Calls whose result is state, whatever it is called."""
HARMLESS = (
    *("compile", "Struct", "TypeVar", "ParamSpec", "NewType", "getLogger", "ContextVar", "frozenset", "tuple"),
    *("Path", "PurePosixPath", "MappingProxyType", "namedtuple", "timedelta", "cast"),
)
"""Calls that a name in small letters may be bound to."""


@dataclass(frozen=True, slots=True, order=True)
class Breach:
    """One crossing."""

    rule: int
    path: str
    line: int
    what: str


@dataclass(frozen=True, slots=True)
class File:
    """A parsed file below the root."""

    path: str
    tree: ast.Module

    @property
    def parts(self) -> tuple[str, ...]:
        return pathlib.PurePosixPath(self.path).parts

    @property
    def in_worker(self) -> bool:
        return "worker" in self.parts[:-1]

    @property
    def is_pure(self) -> bool:
        head = (ast.get_docstring(self.tree) or "").split("Law of this room:")
        return self.path in PURE or (len(head) == 2 and head[1].split()[0].strip(";.,") == "pure")


def files(root: pathlib.Path) -> list[File]:
    """Every Python file of services/ and clients/, generated ones left out."""
    found = []
    for top in ("services", "clients/python/qlorad"):
        for path in sorted((root / top).rglob("*.py")):
            if "_pb2" not in path.name:
                found.append(File(path.relative_to(root).as_posix(), ast.parse(path.read_text())))
    return found


def imports(file: File) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with "from a import b" as a.b; TYPE_CHECKING counts too."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = pathlib.PurePosixPath(file.path).parent.parts
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([p for p in package if p not in ("clients", "python")] + ([base] if base else []))
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == r or name.startswith(r + ".") for r in roots)


def _rule_1(file: File) -> Iterator[Breach]:
    """Client and stubs import nobody of ours; common imports stubs; a service itself, common and stubs."""
    for name, line in imports(file):
        if file.parts[0] == "clients":
            if _within(name, ("services", "tests")):
                yield Breach(1, file.path, line, f"the client imports {name}")
        elif name.startswith("qlorad") and not _within(name, ("qlorad.v1",)):
            yield Breach(1, file.path, line, f"a daemon imports the client: {name}")
        elif _within(name, ("services",)):
            room = file.parts[1] if len(file.parts) > 2 else ""
            other = name.split(".")[1] if "." in name else ""
            if other in SERVICES and other != room:
                yield Breach(1, file.path, line, f"{room or 'services'} imports {name}")


def _rule_2(file: File) -> Iterator[Breach]:
    """grpc only in servicer, app, common/server, common/interceptors, clients."""
    if file.parts[0] == "clients" or file.path in GRPC_COMMON:
        return
    if len(file.parts) == 3 and file.parts[1] in SERVICES and file.parts[2] in GRPC_FILES:
        return
    for name, line in imports(file):
        if name.split(".")[0] in ("grpc", "grpc_health", "grpc_reflection", "grpc_status") or "_pb2_grpc" in name:
            yield Breach(2, file.path, line, f"imports {name}")


def _rule_3(file: File) -> Iterator[Breach]:
    """torch and its kin only under a worker/."""
    if not file.in_worker:
        for name, line in imports(file):
            if _within(name, TORCH):
                yield Breach(3, file.path, line, f"imports {name}")


def _rule_4(file: File) -> Iterator[Breach]:
    """Pure files do no I/O and read no clock."""
    if not file.is_pure:
        return
    for name, line in imports(file):
        if _within(name, IMPURE):
            yield Breach(4, file.path, line, f"a pure file imports {name}")
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in ("open", "print", "input"):
                yield Breach(4, file.path, node.lineno, f"a pure file calls {called.id}")
            if isinstance(called, ast.Attribute) and called.attr in CLOCKS:
                yield Breach(4, file.path, node.lineno, f"a pure file calls .{called.attr}")


def _rule_5(file: File) -> Iterator[Breach]:
    """No module-level state, no work at import. A CONSTANT may be computed; the command line's verbs register."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Global):
            yield Breach(5, file.path, node.lineno, f"global {', '.join(node.names)}")
    if "cli" in file.parts:
        return
    for node in file.tree.body:
        if isinstance(node, (ast.For, ast.While, ast.With, ast.Try)):
            yield Breach(5, file.path, node.lineno, "work at import")
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            told = ast.unparse(node)
            if not (file.in_worker and told.startswith("os.environ.setdefault(")):  # torch reads it when imported
                yield Breach(5, file.path, node.lineno, f"work at import: {told[:60]}")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            constant = all(n.strip("_").isupper() or n.startswith("__") for n in map(ast.unparse, targets))
            alias = isinstance(node.value, ast.Subscript)  # a name for a type
            if not alias and any(_state(inner, constant) for inner in ast.walk(node.value)):
                yield Breach(5, file.path, node.lineno, f"state at import: {ast.unparse(node)[:60]}")


def _state(value: ast.AST, constant: bool) -> bool:
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func).split(".")[-1]
        return name in STATEFUL or not (constant or name in HARMLESS)
    return isinstance(value, (ast.List, ast.Dict, ast.Set)) and not constant


def _rule_6(file: File) -> Iterator[Breach]:
    """Decisions are frozen dataclasses: in the files that decide every dataclass is frozen and slotted."""
    if file.path not in PURE:
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef) and not any(ast.unparse(b).endswith("Exception") for b in node.bases):
            for mark in node.decorator_list:
                text = ast.unparse(mark)
                if "dataclass" in text and not ("frozen=True" in text and "slots=True" in text):
                    yield Breach(6, file.path, node.lineno, f"{node.name} is not frozen and slotted")


def _rule_7(file: File) -> Iterator[Breach]:
    """Plug-ins load only in a worker."""
    if file.parts[0] == "clients" or file.in_worker:
        return
    for name, line in imports(file):
        if _within(name, PLUGINS):
            yield Breach(7, file.path, line, f"imports {name}")
    finds = any(_within(name, ("importlib.metadata",)) for name, _ in imports(file))
    for node in ast.walk(file.tree):
        if finds and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == LOADED:
            yield Breach(7, file.path, node.lineno, "loads an entry point")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield Breach(7, file.path, node.lineno, f"calls {ast.unparse(node.func)}")


RULES = (_rule_1, _rule_2, _rule_3, _rule_4, _rule_5, _rule_6, _rule_7)


def breaches(root: pathlib.Path) -> list[Breach]:
    """Every crossing below a root."""
    return sorted(b for file in files(root) for rule in RULES for b in rule(file))
