"""The scan of a memory of slots by the C code: when it serves, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.gates import Factor
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Ends, Lanes, Stand, stand, states
from nestling.memory.native.runs import Runs, runs
from nestling.memory.native.scan import orderly, runs_here
from nestling.memory.norm import EPS
from nestling.memory.state import MemoryState
from nestling.native import HEADERS, without

if TYPE_CHECKING:
    from nestling.memory.lattice import Lattice
    from nestling.memory.slots import SlotMemory, Streams

SOURCE = HEADERS / "lattice.c"


class LatticeScan(Lanes):
    """One scan of Lattice. Streams: codes of the queries and keys, v, γ and log μ, `[lane, head, time, …]`, the last or None."""

    source = SOURCE
    entry = "nestling_lattice"
    names = ("q", "k", "v", "lr", "retention")

    def __init__(self, spec: Lattice, cut: Runs, again: Again) -> None:
        super().__init__(spec.name, cut, None, again)
        self.spec = spec

    def structure(self, streams: Given, stand: Stand) -> fields.Lattice:
        spec, (w,) = self.spec, stand.weights
        q = streams[0]
        assert q is not None
        c = fields.Lattice(time=q.shape[2], epsilon=EPS)
        network = c.cell.network
        network.depth, network.width[:2] = 1, w.shape[-2:]
        c.cell.before, c.cell.window, c.cell.erases = spec.read == "before", 1, 1
        c.objective, c.norms = fields.OBJECTIVES.index(spec.objective), fields.READ_NORMS.index(spec.read_norm)
        c.retracts = spec.norm == "retract"
        return c

    def stores(self, structure: fields.Lattice) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        written = self.cut.full and name in ("q", "k", "v")  # every token's gradient
        return torch.empty_like(x) if written else super().like(name, x, lanes)


def _code(spec: SlotMemory, x: Tensor) -> Callable[[Runs, Again], Lanes] | None:
    """The code for these choices and for such tensors, on this machine."""
    from nestling.memory.lattice import Lattice

    if isinstance(spec, Lattice) and spec.phi == "unit" and spec.read != "boundary" and runs_here(SOURCE, x):
        return partial(LatticeScan, spec)
    return None


def scan(
    spec: SlotMemory,
    x: Streams,
    cut: Layout,
    slow: Callable[[SlotMemory, Streams], tuple[Tensor, MemoryState]],
) -> Ends | None:
    """A call by the C code, as `nestling.memory.native.scan.scan`."""
    code = _code(spec, x.lr)
    if code is None or not orderly(x.retention):
        return None
    found = runs(cut, x.lr.shape[2])
    if found is None:
        return None

    def again(streams: Given, at: Stand) -> Ends:
        q, k, v, lr, retention = streams
        assert q is not None
        assert k is not None
        assert v is not None
        assert lr is not None
        start, state = states(x.state, x.start, at)
        kept = None if retention is None else Factor(retention.unsqueeze(-1))
        given = x._replace(start=start, state=state, tokens=(q, k, v), lr=lr.unsqueeze(-1), retention=kept)
        with without():
            return Ends.of(slow(spec, given))

    lr, kept = x.lr.squeeze(-1), None if x.retention is None else x.retention.log.squeeze(-1)
    if not bool(x.fine.all()):
        acts = x.fine[:, None]
        lr, kept = torch.where(acts, lr, 0.0), None if kept is None else torch.where(acts, kept, 0.0)
    return code(found, again).scan((*x.tokens, lr, kept), stand(x.state, x.start, found))
