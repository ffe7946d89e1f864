"""Documents through the door: items with their places, what was left out, and what cannot be read."""

from __future__ import annotations

from qlorad.v1 import datasets_pb2
from tests.datasets.kit import Door

GUIDE = b"""# Field guide

Everything that the station measures is written down on the day it is measured.

## Terms

**Drift**: the slow change of an instrument's zero while nothing is measured.

A blank is defined as a sample that holds everything but what is looked for.

## Calibrating the probe

Before each shift the probe is brought back to zero:

1. Rinse the probe with distilled water.
2. Dry it with paper that leaves no fibres.
3. Press the zero key and wait for the tone.

## How long does a charge last?

About nine hours in summer, and five when it freezes at night.

## Reading the log

The log is a text with one line for each minute. This prints the last one:

```python
print(open("station.log").read().splitlines()[-1])
```

## Pictures

![the station](station.png)
"""


def test_markdown_becomes_a_dataset_of_items_with_their_places(door: Door) -> None:
    made = door.make("guide", GUIDE, filename="station/guide.md")
    assert made.stats.document_items == {"heading": 1, "definition": 2, "procedure": 1, "question": 1, "code": 1}
    assert made.stats.left_out_blocks == {"picture": 1, "lone_heading": 1}
    assert made.lineage.files[0].container == "markdown"
    rows = {r["chat"]["messages"][0]["parts"][0]["text"]: r for r in door.export(made.name)}
    lines = GUIDE.decode().splitlines()
    asked = rows['What are the steps of "Calibrating the probe"?']
    (span,) = asked["origin"]["spans"]
    assert span["unit"] == "DOCUMENT_UNIT_LINE"
    there = lines[int(span["first"]) - 1 : int(span["last"])]
    assert "\n".join(there) == asked["chat"]["messages"][1]["parts"][0]["text"]
    assert GUIDE.decode()[int(span["begin_character"]) : int(span["end_character"])] == "\n".join(there)
    assert asked["origin"]["file"] == "station/guide.md" and asked["origin"]["line"] == span["first"]
    assert asked["metadata"] == {"rule": "procedure", "section": "Calibrating the probe"}
    assert "How long does a charge last?" in rows and 'What does "Drift" mean?' in rows
    left = [f for f in door.findings(made.name) if f.rule == "picture"]
    assert [(f.line, f.severity) for f in left] == [(lines.index("![the station](station.png)") + 1, 1)]
    assert datasets_pb2.RowFormat.Name(made.format) == "ROW_FORMAT_CHAT"
