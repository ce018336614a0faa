"""Which C code a memory's scan goes to, if any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor

from nestling.memory.inputs import Inputs
from nestling.memory.layout import Layout
from nestling.memory.native import channel
from nestling.memory.native.lanes import Ends
from nestling.memory.native.scan import Cell
from nestling.memory.native.scan import scan as in_tiles
from nestling.memory.native.scan import serves as serves_tiles
from nestling.memory.state import MemoryState

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec


_ONLY: ContextVar[bool] = ContextVar("only", default=False)


class Declined(Exception):
    """The C code does not serve a call."""


@contextmanager
def only() -> Iterator[None]:
    """A scan that would go the framework's way, from its beginning or after an overflow, raises `Declined` here instead."""
    token = _ONLY.set(True)
    try:
        yield
    finally:
        _ONLY.reset(token)


def serves(cell: Cell, x: Tensor) -> bool:
    """Whether there is C code for these choices and for such tensors, on this machine."""
    return serves_tiles(cell, x) or channel.serves(cell, x)


def scan(
    spec: MemorySpec, x: Inputs, cut: Layout, slow: Callable[[MemorySpec, Inputs], tuple[Tensor, MemoryState]]
) -> Ends | None:
    """A call by the C code; None where that does not serve, or a guard would have to step in.

    slow   the same call by the framework's operations
    """
    found = in_tiles(spec, x, cut, slow)
    found = channel.scan(spec, x, cut, slow) if found is None else found
    if found is None and _ONLY.get():
        raise Declined
    return found
