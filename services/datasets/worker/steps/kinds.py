"""Which steps there are.

Law of this room: a list of names; how they are found and loaded is
services/common/worker/plugins.py.
"""

from __future__ import annotations

import json

from qlorad.v1 import datasets_pb2
from services.common.worker.plugins import Kind, Kinds, Sort

_ROOM = "services.datasets.worker.steps"
STEPS = Sort(
    group="qlorad.steps",
    noun="step",
    method="apply(example)",
    built_in={
        name: f"{_ROOM}.{place}"
        for name, place in {
            "as_instruction": "shaping:AsInstruction",
            "as_text": "shaping:AsText",
            "citations": "citations:Citations",
            "keep_languages": "choosing:KeepLanguages",
            "line_ends": "writing:LineEnds",
            "max_characters": "choosing:MaxCharacters",
            "max_words": "choosing:MaxWords",
            "metadata": "shaping:Metadata",
            "min_words": "choosing:MinWords",
            "notation": "notation:Notation",
            "redact": "redacting:Redact",
            "sample": "choosing:Sample",
            "strip_tags": "writing:StripTags",
            "system_prompt": "shaping:SystemPrompt",
            "unicode": "writing:Unicode",
            "whitespace": "writing:Whitespace",
        }.items()
    },
)


def steps() -> Kinds:
    """The steps of this installation."""
    return Kinds(STEPS)


def told(kind: Kind) -> datasets_pb2.StepKind:
    """A step as ListSteps tells it."""
    return datasets_pb2.StepKind(
        name=kind.name,
        description=kind.description,
        package=kind.package,
        parameters_schema_json=json.dumps(kind.schema, ensure_ascii=False),
    )
