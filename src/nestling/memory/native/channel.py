"""The scan of a matrix that keeps each channel by its own share, by the C code: token by token, as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.biases import DotProduct
from nestling.memory.gates import Factor, factor
from nestling.memory.inputs import Inputs
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Ends, Lanes, Stand, stand, states
from nestling.memory.native.runs import Runs, tokens
from nestling.memory.native.scan import Cell, runs_here
from nestling.memory.networks import Matrix
from nestling.memory.retentions import Decay
from nestling.memory.rules import DeltaGradient, Gradient, Implicit
from nestling.memory.state import MemoryState
from nestling.native import HEADERS, without

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

SOURCE = HEADERS / "channel.c"
ERASES = {"none": 0, "with_decay": 1, "after_decay": 2}
SCRATCH = 2**20  # bytes of weights that are made again at a time, to stay in a core's second cache


def serves(cell: Cell, x: Tensor) -> bool:
    """Whether there is C code for these choices and for such tensors, on this machine."""
    return _known(cell) and runs_here(SOURCE, x)


@lru_cache
def _known(cell: Cell) -> bool:
    return (
        type(cell.network) is Matrix
        and type(cell.bias) is DotProduct
        and cell.retention == Decay(per_channel=True)
        and type(cell.rule) in (Gradient, DeltaGradient, Implicit)
        and not cell.rule.momentum
        and cell.read != "boundary"
    )


class Scan(Lanes):
    """One scan of a memory. Streams: q, k, v, η, the channels' α or their logarithms, ε, `[lane, head, time, …]` or None."""

    source = SOURCE
    entry = "nestling_channel"
    names = fields.CHANNEL

    def __init__(self, cell: Cell, logs: bool, cut: Runs, fine: Tensor | None, again: Again) -> None:
        super().__init__(cell.name, cut, fine, again)
        self.cell, self.logs = cell, logs

    def structure(self, streams: Given, stand: Stand) -> fields.Channel:
        q = streams[0]
        assert q is not None
        cell, (w,) = self.cell, stand.weights
        c = fields.Channel(time=q.shape[2], in_=w.shape[-2], out=w.shape[-1], logs=self.logs)
        c.erases, c.before = ERASES[cell.rule.erase], cell.read == "before"
        return c

    def stores(self, structure: fields.Channel) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        whole = self.cut.full and self.fine is None  # every token's gradient is written then
        return torch.empty_like(x) if whole else super().like(name, x, lanes)

    def group(self, stand: Stand) -> int:
        (w,) = stand.weights
        return min(64, max(32, SCRATCH // (w.element_size() * w.shape[-2] * w.shape[-1])))

    def keeps(self, stand: Stand) -> int:
        return stand.weights[0].numel()  # the anchor is never read


def scan(
    spec: MemorySpec, x: Inputs, cut: Layout, slow: Callable[[MemorySpec, Inputs], tuple[Tensor, MemoryState]]
) -> Ends | None:
    """A call by the C code, as `nestling.memory.native.scan.scan`."""
    cell, gate = Cell.of(spec, spec.network), x.retention
    if not serves(cell, x.q):
        return None
    x = x.featured()
    logs = gate is not None and gate.value is None

    def again(streams: Given, at: Stand) -> Ends:
        q, k, v, lr, retention, erase = streams
        assert q is not None
        assert k is not None
        assert v is not None
        assert lr is not None
        start, state = states(x.state, x.start, at)
        shares = None if retention is None else Factor(retention) if logs else factor(retention, None, retention.dtype)
        given = x._replace(start=start, state=state, q=q, k=k, v=v, lr=lr, retention=shares, erase=erase)
        with without():
            return Ends.of(slow(spec, given))

    fine = None if bool(x.fine.all()) else x.fine.contiguous()
    retention = None if gate is None else gate.log if logs else gate.value
    if retention is not None:
        retention = retention.contiguous()  # once, as it is kept for the backward pass
    streams = x.q, x.k, x.v, x.lr, retention, x.erase
    found = tokens(cut, x.q.shape[2])
    return Scan(cell, logs, found, fine, again).scan(streams, stand(x.state, x.start, found))
