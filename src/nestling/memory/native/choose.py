"""Which C code a memory's scan goes to, if any."""

from __future__ import annotations

from collections.abc import Callable
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
    return channel.scan(spec, x, cut, slow) if found is None else found
