"""P27: what a ledger holds of random chats is what transformers makes of them, ids and masks."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from typing import Any

import pytest

from qlorad.v1 import datasets_pb2
from services.common.prompt import example, ledger
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, seal_dataset, seal_model
from tests.common.prompt.shapes import Shape
from tests.common.prompt.talks import STRANGE, talk

# Those that take turns in any number: a template that takes thoughts out of earlier turns has no place for all.
TABLE = [s for s in shapes.ALL if s.name != "thinking-cut"]
MARKED = [s for s in TABLE if s.marked]
# Not the one whose generation prompt is not how its turns begin: without marks it is refused, as test_rows tells.
PLAIN = [s for s in MARKED if s.name != "indented-blocks"]


class _Fixed(datetime.datetime):
    """The oracle's clock, stopped on the manifest's date."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Fixed:
        return cls.fromisoformat(DATE)


def unmarked(shape: Shape) -> Shape:
    source = shape.source
    for mark in ("generation", "endgeneration"):
        for left in ("{%-", "{%"):
            source = source.replace(f"{left} {mark} %}}", "{%- if true %}" if mark == "generation" else "{%- endif %}")
    return dataclasses.replace(shape, source=source)


def built(folder: pathlib.Path, shape: Shape, count: int) -> tuple[ledger.LedgerSplitReader, pathlib.Path, list[Any]]:
    """The ledger of random chats, the model's folder, and the chats."""
    shelf = Shelf(folder / "store")
    model = seal_model(shelf, shape.source, context=4096)
    # Tools at the last user turn only: without marks the place of earlier answers cannot be known.
    tools = shape.tools and shape.prefixes
    chats = [talk(seed, shape.system, tools) for seed in range(count)]
    sealed = ledger.build(
        shelf, seal_dataset(shelf, {"train": chats}), model, 4096, datasets_pb2.OVER_LENGTH_ERROR, lambda *p: None
    )
    read = ledger.LedgerReader.open(sealed).split("train")
    assert len(read) == count
    return read, model.payload, chats


def check(folder: pathlib.Path, shape: Shape, count: int) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    read, payload, chats = built(folder, shape, count)
    oracle = PreTrainedTokenizerFast.from_pretrained(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _Fixed)
        trained = 0
        for number, chat in enumerate(chats):
            messages, tools = example.as_template_sees(chat.chat)
            asked = {"tools": tools, "return_dict": True}
            theirs = oracle.apply_chat_template(messages, return_assistant_tokens_mask=shape.marked, **asked)
            assert read.ids(number).tolist() == theirs["input_ids"], number
            if shape.marked:
                assert read.mask(number).tolist() == theirs["assistant_masks"], number
            row = read.row(number)
            assert (row.source_row, row.origin, row.piece) == (number, chat.origin, 0)
            trained += sum(row.trained)
        assert trained > 5 * count


@pytest.mark.parametrize("shape", TABLE, ids=lambda s: s.name)
def test_ids_and_masks_are_those_of_transformers(tmp_path: pathlib.Path, shape: Shape) -> None:
    assert len(TABLE) >= 8 and len(MARKED) >= 3 and len(PLAIN) >= 3
    check(tmp_path, shape, 150)


@pytest.mark.slow
@pytest.mark.parametrize("shape", TABLE, ids=lambda s: s.name)
def test_a_thousand_chats_have_the_ids_and_masks_of_transformers(tmp_path: pathlib.Path, shape: Shape) -> None:
    check(tmp_path, shape, 1000)


@pytest.mark.parametrize("shape", PLAIN, ids=lambda s: s.name)
def test_without_marks_the_same_tokens_are_trained_and_blanks_after_them(tmp_path: pathlib.Path, shape: Shape) -> None:
    bare = unmarked(shape)
    assert shape.marked and not bare.marked
    read, payload, chats = built(tmp_path / "marked", shape, 20)
    prefixes, _, _ = built(tmp_path / "bare", bare, 20)
    tokenizer = Tokenizer.open(payload)
    for number in range(len(chats)):
        ids, mask, wider = read.ids(number), read.mask(number), prefixes.mask(number)
        assert ids.tolist() == prefixes.ids(number).tolist()
        assert (wider >= mask).all()
        assert tokenizer.decode(ids[(wider != mask)].tolist()).strip() == ""


def test_strange_text_comes_through_unharmed(tmp_path: pathlib.Path) -> None:
    """Tamil, Chinese, emoji, right-to-left, CRLF: what was said is what is trained, byte for byte."""
    shelf = Shelf(tmp_path / "store")
    model = seal_model(shelf, shapes.CHATML_MARKED.source, context=4096)
    from tests.common.prompt.models import chat, completion

    rows = [chat(("user", s), ("assistant", s), line=n + 1) for n, s in enumerate(STRANGE)]
    rows += [completion("", s, line=n + 1) for n, s in enumerate(STRANGE)]
    dataset = seal_dataset(shelf, {"train": rows})
    sealed = ledger.build(shelf, dataset, model, 4096, datasets_pb2.OVER_LENGTH_ERROR, lambda *p: None)
    read, tokenizer = ledger.LedgerReader.open(sealed).split("train"), Tokenizer.open(model.payload)
    for number, said in enumerate(STRANGE * 2):
        ids, mask = read.ids(number), read.mask(number)
        assert tokenizer.decode(ids.tolist()) == read.row(number).text
        end = "<|im_end|>" if number < len(STRANGE) else "</s>"
        assert tokenizer.decode(ids[mask == 1].tolist()).encode() == (said + end).encode()
