"""Makes docs/settings.md, metrics.md and cli.md, and tables of docs/formats.md and steps.md, from what programs say.

`python -m tests.contract.reference` writes them; test_reference holds them
against the programs. Not for prose: that stands in the other pages.
"""

from __future__ import annotations

import importlib
import pathlib
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from services.common import config
from tests.contract import formats, steps
from tests.house import ROOT, House, house

SERVICES = config.SERVICES


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


SETTINGS = """# Settings

A setting of a daemon is a flag (`--max-queue 5`), an environment variable with the daemon's name
(`QLORAD_TRAINER_MAX_QUEUE=5`), or a key in a YAML file, under the daemon's name or under `all:`.
Flags win over the environment, the environment over the file. The file is `--config FILE`, else
`QLORAD_CONFIG`, else `config.yaml` in the home; the home is `--home`, else `QLORAD_HOME`, else
`~/.qlorad`. An unknown key, a value out of bounds, a file that cannot be read: every fault is told at
once, and the daemon does not start.

```yaml
all:
  log_level: DEBUG
trainer:
  drain_seconds: 60
```
"""
METRICS = """# Metrics

Each daemon serves `/metrics` in Prometheus' text form on its own port (9101 datasets, 9102 registry,
9103 trainer, 9104 inference). A series about a job, a model or an adapter lives as long as its thing.
"""
CLI = """# Command line

`qlorad` finds the daemons of a home by itself. Global options stand before the verb. Exit codes: 0 ok,
1 other, 2 usage or a request that was refused as invalid, 3 not found, 4 authentication, 5 unavailable,
6 a job failed, 130 interrupted. With `-o json` the keys are the contract's field names, and errors are
one JSON document too.
"""


def settings() -> str:
    """docs/settings.md."""
    known = {s: config.settings_of(importlib.import_module(f"services.{s}.app").Config) for s in SERVICES}
    shared = [k for k in known["datasets"] if all(k.name in {o.name for o in known[s]} for s in SERVICES)]
    lines = SETTINGS.splitlines()
    groups = {"Every daemon": shared}
    groups |= {f"qlorad-{s}": [k for k in known[s] if k.name not in {o.name for o in shared}] for s in SERVICES}
    for title, found in groups.items():
        lines += ["", f"## {title}", ""]
        if not found:
            lines.append("Nothing of its own.")
            continue
        lines += ["| flag | what it is | accepted | default |", "|---|---|---|---|"]
        for k in found:
            value = ",".join(map(str, k.default)) if isinstance(k.default, tuple) else k.default
            default = "" if value == "" else f"`{value}`"
            lines.append(f"| `{k.flag}` | {_cell(k.help)} | {_cell(k.accepted)} | {_cell(default)} |")
    return "\n".join(lines) + "\n"


def families(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, kind and help of every metric in an exposition, but for the moments when series were made."""
    helps: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split(" ", 3)
        if words[:2] == ["#", "HELP"]:
            helps[words[2]] = words[3] if len(words) > 3 else ""
        elif words[:2] == ["#", "TYPE"] and not words[2].endswith("_created"):
            yield words[2], words[3], helps[words[2]]


def scrape(h: House, service: str) -> str:
    """/metrics of a running daemon."""
    with urllib.request.urlopen(f"http://{h.daemons[service].told['metrics']}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def metrics(told: Mapping[str, str]) -> str:
    """docs/metrics.md, from the expositions of all daemons."""
    found = {s: {name: (kind, help) for name, kind, help in families(told[s])} for s in SERVICES}
    shared = [n for n in found["datasets"] if all(n in found[s] for s in SERVICES)]
    lines = METRICS.splitlines()
    groups = {"Every daemon": {n: found["datasets"][n] for n in shared}}
    groups |= {f"qlorad-{s}": {n: v for n, v in found[s].items() if n not in shared} for s in SERVICES}
    for title, rows in groups.items():
        lines += ["", f"## {title}", ""]
        if not rows:
            lines.append("Nothing of its own.")
            continue
        lines += ["| metric | kind | what it is |", "|---|---|---|"]
        lines += [f"| `{name}` | {kind} | {_cell(help)} |" for name, (kind, help) in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def cli() -> str:
    """docs/cli.md."""
    import typer.main

    from qlorad.cli.main import EXIT_CODES, app

    lines = CLI.splitlines()
    assert set(EXIT_CODES.values()) == {2, 3, 4, 5, 6, 130}

    def walk(command: Any, path: str) -> None:
        inner = getattr(command, "commands", None)
        if inner is not None:
            options(command, path)
            for name in inner:
                walk(inner[name], f"{path} {name}")
            return
        options(command, path)

    def options(command: Any, path: str) -> None:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        shown = " ".join(f"[{p.name.upper()}]" if not p.required else p.name.upper() for p in arguments)
        lines.extend(["", f"{'#' * (1 + len(path.split()))} {path} {shown}".rstrip(), "", _cell(command.help or "")])
        rows = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        if rows:
            lines.extend(["", "| option | what it is | default |", "|---|---|---|"])
        for p in rows:
            names = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
            default = "" if p.default in (None, "", False, ()) or callable(p.default) else f"`{p.default}`"
            lines.append(f"| {names} | {_cell(p.help or '')} | {_cell(default)} |")

    walk(typer.main.get_command(app), "qlorad")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, house(pathlib.Path(folder)) as h:
        for service in SERVICES:
            h.start(service)
        told = {s: scrape(h, s) for s in SERVICES}
    (ROOT / "docs" / "metrics.md").write_text(metrics(told))
    (ROOT / "docs" / "settings.md").write_text(settings())
    (ROOT / "docs" / "cli.md").write_text(cli())
    formats.main()
    steps.main()


if __name__ == "__main__":
    main()
