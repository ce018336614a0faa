"""The scans of memories of slots by the C code: when it serves, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.memory.gates import Factor
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Ends, Lanes, Stand, stand, states
from nestling.memory.native.runs import Runs, runs
from nestling.memory.native.scan import orderly, runs_here
from nestling.memory.networks.layer_norm import EPS as NORM_EPS
from nestling.memory.norm import EPS
from nestling.memory.state import MemoryState
from nestling.native import HEADERS, without

if TYPE_CHECKING:
    from nestling.memory.lattice import Lattice
    from nestling.memory.slots import SlotMemory, Streams
    from nestling.memory.trellis import Trellis

LATTICE = HEADERS / "lattice.c"
TRELLIS = HEADERS / "trellis.c"


class Scan(Lanes):
    """One scan. Streams: the spec's own, `[lane, head, time, dim]`, and for each pass γ and the log of what is kept, or None,
    `[lane, head, time]`."""

    written = ("q", "k", "v")  # whose gradients the C code writes at every token that it reads

    def __init__(self, spec: Any, cut: Runs, again: Again) -> None:
        super().__init__(spec.name, cut, None, again)
        self.spec = spec

    def stores(self, structure: fields.Scan) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        return torch.empty_like(x) if self.cut.full and name in self.written else super().like(name, x, lanes)

    def filled(self, c: fields.Scan, widths: tuple[int, ...], streams: Given, before: bool) -> None:
        """What every memory of slots has: layers of these widths, which only keep and write."""
        q = streams[0]
        assert q is not None
        c.time = q.shape[2]
        c.cell.network.depth, c.cell.network.width[: len(widths)] = len(widths) - 1, widths
        c.cell.before, c.cell.window, c.cell.erases = before, 1, 1


class LatticeScan(Scan):
    """Its own streams: codes of queries and keys, and v."""

    source = LATTICE
    entry = "nestling_lattice"
    names = ("q", "k", "v", "lr", "retention")

    spec: Lattice

    def structure(self, streams: Given, stand: Stand) -> fields.Lattice:
        spec, (slots,) = self.spec, stand.weights
        c = fields.Lattice(epsilon=EPS, retracts=spec.norm == "retract")
        self.filled(c, slots.shape[-2:], streams, spec.read == "before")
        c.objective, c.norms = fields.OBJECTIVES.index(spec.objective), fields.READ_NORMS.index(spec.read_norm)
        return c


class TrellisScan(Scan):
    """Its own streams: q, k, v and codes."""

    source = TRELLIS
    entry = "nestling_trellis"
    names = ("q", "k", "v", "code", "lr", "retention", "lr_2", "retention_2")

    spec: Trellis

    def structure(self, streams: Given, stand: Stand) -> fields.Trellis:
        spec, (keys, values) = self.spec, stand.weights
        c = fields.Trellis(norm_epsilon=NORM_EPS, unit_epsilon=EPS)
        self.filled(c, (*keys.shape[-2:], values.shape[-2]), streams, spec.read == "before")
        c.phi, c.between = fields.PHI.index(spec.phi), fields.BETWEEN.index(spec.between)
        c.predicts, c.reads_phi = spec.objective == "l2", spec.value_read_phi
        return c

    def width(self, stand: Stand) -> int:
        return stand.weights[1].shape[-2]


def _code(spec: SlotMemory, x: Tensor) -> type[Scan] | None:
    """The code for these choices and for such tensors, on this machine."""
    from nestling.memory.lattice import Lattice
    from nestling.memory.trellis import Trellis

    found: type[Scan] | None = None
    if isinstance(spec, Lattice) and spec.phi == "unit" and spec.form == "stale":
        found = LatticeScan
    elif isinstance(spec, Trellis) and spec.phi in fields.PHI and spec.between in fields.BETWEEN and not spec.per_slot:
        found = TrellisScan
    served = found is not None and spec.read != "boundary" and runs_here(found.source, x)
    return found if served else None


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
    own = len(x.tokens)

    def again(streams: Given, at: Stand) -> Ends:
        tokens = tuple(u for u in streams[:own] if u is not None)
        lr, kept = ([u for u in streams[n::2] if u is not None] for n in (own, own + 1))
        retention = Factor(torch.stack(kept, -1)) if kept else None
        start, state = states(x.state, x.start, at)
        given = x._replace(start=start, state=state, tokens=tokens, lr=torch.stack(lr, -1), retention=retention)
        with without():
            return Ends.of(slow(spec, given))

    acts = None if bool(x.fine.all()) else x.fine[:, None]
    gates = list[Tensor | None]()
    for n, rate in enumerate(x.lr.unbind(-1)):
        kept = None if x.retention is None else x.retention.log[..., n]
        gates += [u if u is None or acts is None else torch.where(acts, u, 0.0) for u in (rate, kept)]
    given = (*x.tokens, *gates)
    none = (None,) * (len(code.names) - len(given))
    return code(spec, found, again).scan((*given, *none), stand(x.state, x.start, found))
