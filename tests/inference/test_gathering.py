"""An engine without work waits a moment for those who come together with the first, so that they are read together."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from services.inference.worker import engine
from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def idle() -> Any:
    """An engine's loop around a real scheduler, without a daemon."""
    made = engine.Engine.__new__(engine.Engine)
    made._inbox, made._unread = queue.SimpleQueue(), set()
    made.base = SimpleNamespace(scheduler=None, rows=kit.engine(kit.tiny("Llama")))
    made.base.scheduler = made.base.rows.scheduler
    return made


def asking(idle: Any, number: int) -> list[engine.Report]:
    idle.base.rows.ask(kit.prompt_of(number, 6), max_tokens=3)
    idle._unread.discard(number)
    return []


def test_who_is_still_read_is_waited_for(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOMENT", 60.0)
    idle._unread.update({1, 2, 3})

    def first() -> list[engine.Report]:
        said = asking(idle, 1)
        for number in (2, 3):
            threading.Thread(target=idle._inbox.put, args=(lambda number=number: asking(idle, number),)).start()
        return said

    idle._inbox.put(first)
    idle._gather()
    idle.base.scheduler.step()
    assert idle.base.scheduler.gauges().rows == 3, "all in the first step"


def test_nobody_is_waited_for_where_nobody_is_read(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for ever for one who is."""
    monkeypatch.setattr(engine, "_MOMENT", 3600.0)
    idle._inbox.put(lambda: asking(idle, 1))
    idle._gather()
    monkeypatch.setattr(engine, "_MOMENT", 0.01)
    idle._unread.add(9)
    idle._inbox.put(lambda: asking(idle, 2))
    idle._gather()
    idle.base.scheduler.step()
    assert idle.base.scheduler.gauges().rows == 2


def test_an_order_that_leaves_nothing_to_do_is_obeyed_at_once(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOMENT", 3600.0)
    monkeypatch.setattr(engine, "_LULL", 3600.0)
    idle._unread.add(9)
    idle._inbox.put(list)
    assert idle._gather() == []
