"""Presets: shipped ones, one's own, and what they do to a conversation."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import inference_pb2 as pb
from qlorad.v1 import messages_pb2
from services.common import idempotency
from services.common.errors import Fault, Reason
from services.common.store import Store
from services.inference import preset, preset_book
from services.inference.app import shipped_presets
from services.inference.preset_book import PresetBook
from tests.inference.kit import turn

SYSTEM, USER, ASSISTANT = messages_pb2.ROLE_SYSTEM, messages_pb2.ROLE_USER, messages_pb2.ROLE_ASSISTANT


def mine(name: str = "presets/mine", **more: object) -> pb.Preset:
    told = {"template": "Say: {input}!", "system": "Be kind."} | more
    return pb.Preset(name=name, **told)  # type: ignore[arg-type]


def said(conversation: messages_pb2.Conversation) -> list[tuple[int, str]]:
    return [(m.role, "".join(p.text for p in m.parts)) for m in conversation.messages]


def test_the_shipped_ones_are_sound_and_are_the_three() -> None:
    shipped = shipped_presets()
    assert sorted(shipped) == ["presets/analyse-paper", "presets/review-code", "presets/summarise-paper"]
    assert all(p.is_shipped and p.description and p.system and p.options.max_tokens for p in shipped.values())


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": "mine"}, "name"), ({"name": "presets/Mine"}, "name"), ({"name": ""}, "name"),
        ({"template": "no place"}, "template"), ({"template": ""}, "template"),
        ({"template": "{input} {input}"}, "template"), ({"description": "x" * 1001}, "description"),
        ({"system": "x" * (1 << 17)}, "system"), ({"is_shipped": True}, "is_shipped"),
        ({"options": pb.GenerationOptions(temperature=3)}, "options.temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_names_its_field(wrong: dict, field: str) -> None:
    assert [v.field for v in preset.check(mine(**wrong))] == [f"preset.{field}"]


def test_a_system_turn_of_the_caller_stays() -> None:
    own = messages_pb2.Conversation(messages=[turn(SYSTEM, "Mine."), turn(USER, "a")])
    assert said(preset.applied(mine(), own)) == [(SYSTEM, "Mine."), (USER, "Say: a!")]
    none = messages_pb2.Conversation(messages=[turn(USER, "a"), turn(ASSISTANT, "b"), turn(USER, "c")])
    expected = [(SYSTEM, "Be kind."), (USER, "a"), (ASSISTANT, "b"), (USER, "Say: c!")]
    assert said(preset.applied(mine(), none)) == expected
    assert said(none)[-1] == (USER, "c"), "what was given is left alone"
    assert len(preset.applied(mine(system=""), none).messages) == 3


@given(
    st.sampled_from(["{input}", "a {input} b{input}", "{", "x"]) | st.text(), st.text(max_size=10), st.text(max_size=10)
)
@settings(max_examples=50)
def test_the_callers_text_goes_in_as_it_is(text: str, before: str, after: str) -> None:
    told = mine(template=before.replace("{", "") + "{input}" + after.replace("{", ""))
    worded = preset.applied(told, messages_pb2.Conversation(messages=[turn(USER, text)]))
    assert said(worded)[-1][1] == told.template.partition("{input}")[0] + text + told.template.partition("{input}")[2]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "presets.sqlite"


async def opened(path: pathlib.Path) -> tuple[Store, PresetBook]:
    store = Store.open(path, (idempotency.MIGRATION, preset_book.MIGRATION))
    book = PresetBook(store, shipped_presets())
    await book.begin()
    return store, book


async def test_ones_own_outlive_the_daemon_and_ids_are_answered_alike(path: pathlib.Path) -> None:
    store, book = await opened(path)
    create = pb.CreatePresetRequest(preset=mine(), request_id="one")
    made = await book.create(create)
    with pytest.raises(Fault) as twice:
        await book.create(pb.CreatePresetRequest(preset=mine(), request_id="two"))
    assert Reason.Name(twice.value.reason) == "REASON_ALREADY_EXISTS"
    await store.close()

    store, book = await opened(path)
    assert book.all["presets/mine"] == mine() and len(book.all) == 4
    assert await book.create(create) == made
    with pytest.raises(Fault) as other:
        await book.create(pb.CreatePresetRequest(preset=mine(system="else"), request_id="one"))
    assert Reason.Name(other.value.reason) == "REASON_REQUEST_ID_REUSED"
    delete = pb.DeletePresetRequest(name="presets/mine", request_id="three")
    await book.delete(delete)
    await book.delete(delete)
    assert "presets/mine" not in book.all
    for name, reason in (("presets/mine", "NOT_FOUND"), ("presets/review-code", "IN_USE"), ("mine", "INVALID_REQUEST")):
        with pytest.raises(Fault) as refused:
            await book.delete(pb.DeletePresetRequest(name=name))
        assert Reason.Name(refused.value.reason) == f"REASON_{reason}"
    with pytest.raises(Fault) as taken:
        await book.create(pb.CreatePresetRequest(preset=mine("presets/review-code")))
    assert Reason.Name(taken.value.reason) == "REASON_ALREADY_EXISTS"
    await store.close()


@pytest.mark.parametrize("turns", range(1, 5))
async def test_who_leaves_leaves_memory_and_disk_alike(path: pathlib.Path, turns: int) -> None:
    store, book = await opened(path)
    leaving = asyncio.create_task(book.create(pb.CreatePresetRequest(preset=mine())))
    for _ in range(turns):
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await book.settle()
    kept = set(book.all)
    assert "presets/mine" in kept, "what was begun is brought to its end"
    await store.close()
    store, again = await opened(path)
    assert set(again.all) == kept
    await store.close()


async def test_pages_join_to_the_whole_shipped_ones_first(path: pathlib.Path) -> None:
    store, book = await opened(path)
    for n in range(5):
        await book.create(pb.CreatePresetRequest(preset=mine(f"presets/a{n}")))
    names, token = [], ""
    while True:
        page = book.list(pb.ListPresetsRequest(page_size=3, page_token=token))
        names += [p.name for p in page.presets]
        token = page.next_page_token
        if not token:
            break
    assert names == [p.name for p in book.list(pb.ListPresetsRequest()).presets]
    assert names[:3] == sorted(shipped_presets()) and names[3:] == [f"presets/a{n}" for n in range(5)]
    for wrong in (pb.ListPresetsRequest(page_size=501), pb.ListPresetsRequest(page_token="%")):
        with pytest.raises(Fault):
            book.list(wrong)
    await store.close()
