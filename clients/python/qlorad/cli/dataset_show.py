"""How a dataset, its rows and its past look in a terminal.

Law of this room: prints what it is given; asks nobody but for the parents of a lineage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlorad.cli import output as out
from qlorad.cli.output import Format

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.v1 import datasets_pb2

_UNITS = {"DOCUMENT_UNIT_LINE": "line", "DOCUMENT_UNIT_PAGE": "page", "DOCUMENT_UNIT_PARAGRAPH": "paragraph"}
_SPLITS = ("train", "validation", "test")


def _severity(finding: datasets_pb2.Finding) -> str:
    from qlorad.v1 import datasets_pb2 as pb

    return out.word(pb.Severity, "SEVERITY_", finding.severity)


FINDINGS: list[out.Column] = [
    ("SEVERITY", _severity),
    ("WHERE", lambda f: f"{f.file}:{f.line}" if f.line else f.file),
    ("FIELD", lambda f: f.field),
    ("RULE", lambda f: f.rule),
    ("MESSAGE", lambda f: f.message),
    ("HINT", lambda f: f.hint),
]


def show_dataset(wanted: Format, dataset: datasets_pb2.Dataset) -> None:
    """One dataset."""
    stats, lineage = dataset.stats, dataset.lineage
    near = f"{stats.near_duplicate_rows} near" if stats.near_duplicate_rows else ""
    exact = f"{stats.duplicate_rows} exact dropped" if stats.duplicate_rows else ""
    rows = [
        ("name", dataset.name),
        ("digest", dataset.digest),
        ("format", format_of(dataset)),
        ("rows", rows_of(dataset)),
        ("skipped rows", str(stats.skipped_rows or "")),
        ("items", counted(stats.document_items)),
        ("left out", counted(stats.left_out_blocks)),
        ("unread", f"{stats.skipped_documents} documents" if stats.skipped_documents else ""),
        ("duplicates", ", ".join(x for x in (exact, near) if x)),
        ("papers", below_score(stats)),
        ("repaired", counted(stats.repaired)),
        ("dropped", by_step(stats.dropped_by_step)),
        ("changed", by_step(stats.changed_by_step)),
        ("findings", ", ".join(f"{n} {rule}" for rule, n in sorted(stats.findings.items()))),
        ("score", f"{stats.quality.score:.1f} of 100" if stats.quality.parts else ""),
        ("from", lineage.source or ", ".join(p.name for p in lineage.parents)),
        ("size", out.size(dataset.size_bytes)),
        ("created", out.when(dataset.create_time)),
    ]
    out.one(wanted, dataset, rows)


def counted(counts: Mapping[str, int]) -> str:
    """Counts by name, as in "2 role_names"."""
    return ", ".join(f"{counts[k]} {k}" for k in sorted(counts))


def below_score(stats: datasets_pb2.DatasetStats) -> str:
    """Papers that were left out because of their score."""
    return f"{stats.below_score_papers} below the score" if stats.below_score_papers else ""


def by_step(counts: Mapping[str, int]) -> str:
    """Counts by INDEX:NAME in the order of steps, as in "2 by citations"; of steps that stand twice with the index."""
    steps = sorted((int(key.partition(":")[0]), key.partition(":")[2], n) for key, n in counts.items())
    names = [name for _, name, _ in steps]
    return ", ".join(f"{n} by {name}" + (f" ({i})" if names.count(name) > 1 else "") for i, name, n in steps)


def rows_of(dataset: datasets_pb2.Dataset) -> str:
    """Rows by split."""
    rows = dataset.stats.rows
    return ", ".join(f"{rows[n]} {n}" for n in _ordered(rows))


def _ordered(rows: Mapping[str, int]) -> list[str]:
    return [n for n in _SPLITS if n in rows] + sorted(set(rows) - set(_SPLITS))


def format_of(dataset: datasets_pb2.Dataset) -> str:
    """The form of rows; where files differ, the forms."""
    from qlorad.v1 import datasets_pb2 as pb

    if not dataset.format and dataset.stats.forms:
        return ", ".join(sorted(dataset.stats.forms))
    return out.word(pb.RowFormat, "ROW_FORMAT_", dataset.format).lower()


# Rows


def came_from(example: dict[str, Any]) -> str:
    """Where a canonical example stood, as in " (rows.jsonl:7)"."""
    origin = example.get("origin", {})
    if not origin.get("file"):
        return ""
    spans = [f"{s['first']}-{s['last']}" if s["first"] != s["last"] else s["first"] for s in origin.get("spans", [])]
    if spans:
        return f" ({origin['file']}: {_UNITS[origin['spans'][0]['unit']]} {', '.join(spans)})"
    return f" ({origin['file']}:{origin['line']})" if origin.get("line") else f" ({origin['file']})"


def example_text(example: dict[str, Any]) -> str:
    """A canonical example as people read it."""
    return "\n".join(_lines(example))


def _lines(example: dict[str, Any]) -> Iterator[str]:
    if "completion" in example:
        body = example["completion"]
        if body.get("prompt"):
            yield f"[prompt] {body['prompt']}"
        yield f"[{'completion' if body.get('prompt') else 'text'}] {body.get('completion', '')}"
    elif "infill" in example:
        for name in ("prefix", "middle", "suffix"):
            yield f"[{name}] {example['infill'].get(name, '')}"
    elif "preference" in example:
        told = example["preference"]
        yield from _conversation(told.get("prompt", {}))
        for side in ("chosen", "rejected"):
            yield f"[{side}]"
            yield from ("  " + line for line in _turns(told.get(side, [])))
    else:
        yield from _conversation(example.get("chat", {}))
    if example.get("metadata"):
        yield "[metadata] " + json.dumps(example["metadata"], ensure_ascii=False, sort_keys=True)


def _conversation(conversation: dict[str, Any]) -> Iterator[str]:
    for tool in conversation.get("tools", []):
        described = f": {tool['description']}" if tool.get("description") else ""
        yield f"[tool on offer] {tool.get('name')}({tool.get('parameters_json', '')}){described}"
    yield from _turns(conversation.get("messages", []))


def _turns(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        role = str(message.get("role", "")).removeprefix("ROLE_").lower()
        answers = f" {message['tool_call_id']}" if message.get("tool_call_id") else ""
        text = "".join(part.get("text", "") for part in message.get("parts", []))
        yield f"[{role}{answers}] {text}".rstrip()
        for call in message.get("tool_calls", []):
            ident = f" as {call['id']}" if call.get("id") else ""
            yield f"  calls {call.get('name')}({call.get('arguments_json', '')}){ident}"


# Lineage


def lineage(client: Client, dataset: datasets_pb2.Dataset) -> dict[str, Any]:
    """A dataset and all that it was made of, up through its parents; one that is gone says so."""
    from qlorad.errors import NotFound

    parents: list[dict[str, Any]] = []
    for parent in dataset.lineage.parents:
        try:
            found = client.datasets.get(parent.digest)
        except NotFound:
            parents.append({"name": parent.name, "digest": parent.digest, "is_gone": True})
        else:
            parents.append({**lineage(client, found), "name": parent.name})
    told: dict[str, Any] = out.as_dict(dataset.lineage)
    told["parents"] = parents
    for applied in told["steps"]:
        applied["step"]["parameters"] = _whole(applied["step"].get("parameters") or {})
    rows = {split: dataset.stats.rows[split] for split in _ordered(dataset.stats.rows)}
    return {"name": dataset.name, "digest": dataset.digest, "is_gone": False, "rows": rows, **told}


def tree(told: dict[str, Any], fancy: bool) -> list[str]:
    """A lineage as lines."""
    rows = ", ".join(f"{n} {split}" for split, n in told.get("rows", {}).items())
    gone = "gone from this store" if told["is_gone"] else rows
    lines = [f"{told['name']}  {out.short(told['digest'])}  {gone}".rstrip()]
    branches = [[f"repaired: {', '.join(told['repairs'])}"]] if told.get("repairs") else []
    branches += [[_step(s)] for s in told.get("steps", [])]
    branches += [[f"from {told['source']}"]] if told.get("source") else []
    if told.get("min_score") is not None:
        branches += [[f"papers of score {told['min_score']:g} and more"]]
    branches += [_file(f) for f in told.get("files", [])]
    branches += [tree(parent, fancy) for parent in told.get("parents", [])]
    bar, tee, end = ("│  ", "├─ ", "└─ ") if fancy else ("|  ", "|- ", "`- ")
    for i, branch in enumerate(branches):
        last = i == len(branches) - 1
        lines.append((end if last else tee) + branch[0])
        lines += [("   " if last else bar) + line for line in branch[1:]]
    return lines


def _file(told: dict[str, Any]) -> list[str]:
    """A file, and below it where it was fetched from."""
    size = out.size(told["size_bytes"])
    line = f"{told['file']}  sha256:{told['sha256'][:12]}  {size}, {told['container']}, {_form(told['format'])}"
    return [line, f"from {told['url']}"] if told.get("url") else [line]


def _step(applied: dict[str, Any]) -> str:
    step = applied["step"]
    parameters = json.dumps(step["parameters"], ensure_ascii=False) if step.get("parameters") else ""
    return f"step {step['name']} {parameters}".rstrip() + f"  ({applied['package']})"


def _whole(value: Any) -> Any:
    """Whole numbers as such, and keys in order: a Struct has every number as a double, and no order."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in sorted(value.items())}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _form(name: str) -> str:
    return name.removeprefix("ROW_FORMAT_").lower()
