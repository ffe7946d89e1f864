"""P28: an adapter is served with the template and tokenizer it was trained with, or not at all."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil

import pytest

from services.common import facts
from services.common.errors import Fault
from services.common.prompt import golden
from services.common.prompt.render import TEMPLATE, TOKENIZER, Renderer, RenderError
from services.common.shelf import Shelf
from services.inference.choosing import check_lineage
from tests.common.prompt import talks

DATE = "2026-01-01"


def mutated(text: str, draw: random.Random) -> str:
    """One character away, twice, exchanged for another, or between two others."""
    at = draw.randrange(len(text))
    other = draw.choice("aZ0 {}%'\"<|>é\n")
    return draw.choice((
        text[:at] + text[at + 1 :],
        text[:at] + text[at] + text[at:],
        text[:at] + other + text[at + 1 :],
        text[:at] + other + text[at:],
    ))  # fmt: skip


def said(renderer: Renderer, seeds: range) -> list[str]:
    """What some conversations become."""
    conversations = [(talks.plain(talks.talk(seed, tools=False)), None, False) for seed in seeds]
    found = []
    for messages, tools, prompt in [*conversations, *(probe[1:] for probe in golden.PROBES)]:
        try:
            found.append(renderer.render(messages, tools, prompt).text)
        except RenderError:
            found.append("refused")
    return found


def test_p28_two_hundred_mutations_of_template_and_tokenizer_are_refused(
    tmp_path: pathlib.Path, adapters_home: pathlib.Path
) -> None:
    """By lineage every one; a template that speaks otherwise by its golden renderings alone, and no other."""
    shelf = Shelf(adapters_home / "store")
    base, adapter = shelf.open("models", "starter-test"), shelf.open("adapters", "ada")
    true = facts.from_manifest(facts.ModelFacts, base.manifest)
    renderings = facts.from_manifest(facts.AdapterFacts, adapter.manifest).golden
    assert renderings
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.payload.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)

    def judged(renderer: Renderer) -> facts.ModelFacts:
        return dataclasses.replace(
            true, tokenizer_digest=renderer.tokenizer_digest, template_digest=renderer.template_digest
        )

    whole = Renderer.open(folder, DATE)
    check_lineage("ada", adapter.manifest, base.digest, judged(whole))  # the same is not refused
    golden.check(whole, renderings)
    talked = range(40)
    expected = said(whole, talked)
    draw = random.Random(28)
    unreadable = spoke_otherwise = 0
    for number in range(200):
        name = (TEMPLATE, TOKENIZER)[number % 2]
        text = (base.payload / name).read_text()
        changed = mutated(text, draw)
        while changed == text:
            changed = mutated(text, draw)
        (folder / name).write_text(changed)
        try:
            renderer = Renderer.open(folder, DATE)
        except Fault:
            unreadable += 1  # not even a template: the base itself is refused
            continue
        finally:
            (folder / name).write_text(text)
        with pytest.raises(Fault) as refused:
            check_lineage("ada", adapter.manifest, base.digest, judged(renderer))
        assert f"check '{'template' if name == TEMPLATE else 'tokenizer'}'" in refused.value.message
        if said(renderer, talked) != expected:
            spoke_otherwise += 1
            with pytest.raises(Fault, match="golden rendering"):
                golden.check(renderer, renderings)
        else:
            golden.check(renderer, renderings)
    assert unreadable < 60 and spoke_otherwise > 20
