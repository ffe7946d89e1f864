"""Each token with its own adapter, by a part that was compiled at set-up (each.cpp).

Law of this room: reads an adapter's matrices where they lie, each once, and writes only to tokens that have one.
For bfloat16 on a processor. Compiles nothing (see prebuild); where the part is missing the log says so once, and
the stacks do everything.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from services.common.extensions import extensions_folder
from services.inference.worker.stacks import Part

log = logging.getLogger("qlorad.engine")

_FEW = 64
"""Tokens up to which it is quicker than a stack, whatever that is made of."""
_WASTE = 4
"""A stack's ranks to a token's own, from which on it is quicker for any number of tokens."""
_TOGETHER = 8
"""Tokens of one adapter that a thread takes at a time."""
_RANK = 256
"""As in each.cpp."""
_NUMBERS, _ADDRESS = ctypes.c_int64, ctypes.c_void_p

Add = Callable[..., None]


def library() -> pathlib.Path:
    """Where the compiled part lies; another source, or another kind of processor, is another file."""
    kind = f"{os.uname().machine}-{torch.backends.cpu.get_cpu_capability().lower()}"
    source = pathlib.Path(__file__).with_suffix(".cpp").read_bytes()
    folder = extensions_folder(os.environ.get("QLORAD_TORCH_EXTENSIONS", ""), sys.prefix)
    return folder / f"qlorad_each-{kind}-{hashlib.sha256(source).hexdigest()[:12]}.so"


def found(device: torch.device, dtype: torch.dtype) -> Add | None:
    """The compiled part, for those whom it serves."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    try:
        return opened(library())
    except (OSError, AttributeError) as e:
        log.warning("adapters cost more than they need: the part compiled at set-up cannot be used (%s)", e)
        return None


def opened(path: pathlib.Path) -> Add:
    """The compiled part that lies there; OSError or AttributeError where it is none."""
    # Torch is there by now, so both share its threads.
    add: Any = ctypes.PyDLL(str(path)).qlorad_each
    add.argtypes = [_ADDRESS, _ADDRESS, *[_ADDRESS, _NUMBERS] * 3, ctypes.c_int]
    add.restype = None
    return add


def pays(tokens: int, own: int, all_ranks: int) -> bool:
    """Whether it is quicker than a stack of so many ranks, most of which a token of `own` ranks has no use for."""
    return tokens <= _FEW or own * _WASTE <= all_ranks


class _Site(ctypes.Structure):
    _fields_ = (
        *((name, _NUMBERS) for name in ("modules", "places", "width")),
        *((name, _ADDRESS) for name in ("widths", "parts", "starts")),
    )


class _Turn(ctypes.Structure):
    _fields_ = (("count", _NUMBERS), ("groups", _ADDRESS), ("tokens", _ADDRESS))


class Turn:
    """Which adapter each of some tokens has."""

    def __init__(self, places: Sequence[int]) -> None:
        """`places`: the adapter's place in the line, one for each token; -1 = none."""
        order = sorted(range(len(places)), key=lambda token: places[token])
        groups: list[int] = []
        for number, token in enumerate(order):
            if not number or places[token] != groups[-3] or number - groups[-2] == _TOGETHER:
                groups += [places[token], number, number]
            groups[-1] = number + 1
        self._kept = (_numbers(groups), _numbers(order))
        self._struct = _Turn(len(groups) // 3, *map(ctypes.addressof, self._kept))
        self.address = ctypes.addressof(self._struct)


class Table:
    """Where the matrices of adapters in line lie at the modules of one site. Keeps them there."""

    def __init__(self, add: Add, line: Sequence[Mapping[str, Part]], names: Sequence[str], outs: Sequence[int]) -> None:
        self._add = add
        starts = [sum(outs[:n]) for n in range(len(outs))]
        parts = [[there.get(name) for there in line] for name in names]
        width = next((part.a.shape[1] for row in parts for part in row if part is not None), 0)
        told = [n for row in parts for part in row for n in _told(part)]
        numbers = [_numbers(some) for some in (outs, told, starts)]
        self._kept = (numbers, parts)
        self._struct = _Site(len(names), len(line), width, *map(ctypes.addressof, numbers))
        self._address = ctypes.addressof(self._struct)

    def add(self, turn: Turn, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to `out` [tokens, all outputs of the site] what the tokens' adapters make of `x` [tokens, in]."""
        self._add(self._address, turn.address, *_rows(x), *_rows(out), 0, 0, torch.get_num_threads())

    def gate(self, turn: Turn, x: torch.Tensor, opening: torch.Tensor, passing: torch.Tensor) -> torch.Tensor:
        """silu(opening) * passing, once both have what the tokens' adapters make of `x`; `opening` becomes it."""
        threads = torch.get_num_threads()
        self._add(self._address, turn.address, *_rows(x), *_rows(opening), *_rows(passing), threads)
        return opening


def table(add: Add, line: Sequence[Mapping[str, Part]], names: Sequence[str], outs: Sequence[int]) -> Table | None:
    """None where an adapter in line is not for this room: DoRA needs more, and ranks have a limit."""
    there = [part for parts in line for name in names if (part := parts.get(name)) is not None]
    if any(part.more is not None or part.a.shape[0] > _RANK for part in there):
        return None
    return Table(add, line, names, outs)


def reads(numbers: torch.Tensor) -> bool:
    """Whether they lie in memory as they are read here."""
    return numbers.dtype is torch.bfloat16 and numbers.stride(1) == 1


def _told(part: Part | None) -> tuple[int, int, int]:
    if part is None:
        return 0, 0, 0
    flipped = part.b.t()
    if not (part.a.is_contiguous() and flipped.is_contiguous() and part.a.dtype is part.b.dtype is torch.bfloat16):
        raise TypeError("a part's matrices lie in memory in another way than is read here")
    return part.a.data_ptr(), flipped.data_ptr(), part.a.shape[0]


def _rows(numbers: torch.Tensor) -> tuple[int, int]:
    """Where the rows of a matrix begin, and how far they are from one another."""
    apart, next_to = numbers.stride()
    if next_to != 1 or numbers.dtype is not torch.bfloat16:
        raise TypeError(f"{numbers.dtype} with strides {numbers.stride()} is not read here")
    return numbers.data_ptr(), apart


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (_NUMBERS * len(values))(*values)
