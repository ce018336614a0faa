"""The scan of memories over exponential features by the C code: when it serves, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.features.exponential import CAP
from nestling.memory.gates import Factor
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Ends, Lanes, Stand, apart, in_step
from nestling.memory.native.runs import Runs, runs
from nestling.memory.native.scan import Cell, orderly, runs_here
from nestling.memory.native.scan import serves as serves_cell
from nestling.memory.networks import MLP
from nestling.memory.state import Tail, Weights
from nestling.native import HEADERS, without

if TYPE_CHECKING:
    from nestling.memory.kernel import KernelMemory, KernelState, Streams

KERNEL = HEADERS / "kernel.c"
MADE = 7  # numbers that are made of a tile for each of its rows and each of the first layer's outputs

Found = tuple[Ends, Weights]
"""Of a scan, with the pairs `[lane, head, pair, …]` behind it; none where there is a span."""


def serves(spec: KernelMemory, x: Tensor) -> bool:
    """Whether there is C code for these choices and for such tensors, on this machine."""
    cell = Cell.of(spec, spec.network)
    fits = isinstance(spec.network, MLP) and spec.network.depth > 1 and spec.read != "boundary"
    return fits and serves_cell(cell, x) and runs_here(KERNEL, x)


class Scan(Lanes):
    """One scan. Streams: q, k, v, η, log α and the window's weights, `[lane, head, time, …]` or None, k and v with the tokens
    before them, of a span with η as v's last coordinate; s of each head; and pairs `[lane, head, pair, …]`, or None.

    count, room   pairs before the call and behind it;  opens: a chunk begins with the call
    """

    source = KERNEL
    entry = "nestling_kernel"
    names = ("q", "k", "v", "lr", "retention", "window", "scale", *fields.PAIRS)

    def __init__(
        self,
        spec: KernelMemory,
        cut: Runs,
        fine: Tensor | None,
        again: Callable[[Given, Stand], Found],
        *,
        count: int = 0,
        room: int = 0,
        opens: bool = True,
    ) -> None:
        super().__init__(spec.name, cut, fine, lambda streams, at: again(streams, at)[0])
        self.spec, self.cell, self._found = spec, Cell.of(spec, spec.network), again
        self.count, self.room, self.opens = count, room, opens
        self._pairs: dict[str, Tensor | None] = {}  # where they are while the C code runs

    def structure(self, streams: Given, stand: Stand) -> fields.Kernel:
        q, _, v = streams[:3]
        assert q is not None
        assert v is not None
        spec = self.spec
        c = fields.Kernel(cell=self.cell.fields(spec.fast_shapes), cap=CAP, span=spec.span or 0, halo=spec.halo)
        c.normalized, c.unit_peak = spec.normalized, spec.kernel.unit_peak
        c.time, c.tail = q.shape[2], v.shape[2] - q.shape[2]
        c.count, c.room, c.opens = self.count, self.room, self.opens
        fields.point(c, self._pairs)
        return c

    def stores(self, structure: fields.Scan) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        return torch.zeros(lanes, *x.shape, dtype=x.dtype) if name == "scale" else torch.zeros_like(x)

    def group(self, stand: Stand) -> int:
        """As many that weights of all memories between groups take the room of what one memory makes of a group's tiles."""
        tiles, tile = self.cut.table.shape[1], 2 * self.cut.longest + self.spec.halo
        return max(1, isqrt(tiles * super().keeps(stand) // (MADE * tile * stand.weights[0].shape[-1])))

    def keeps(self, stand: Stand) -> int:
        return super().keeps(stand) if self.spec.span is None else 0

    def forward(self, given: Given, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        made: Weights = ()
        if self.spec.span is None:
            like, sizes = given[len(self.names)], (self.spec.key_dim, self.spec.fast_shapes[0][1])
            assert like is not None
            lead = (*like.shape[:2], self.room)
            made = (*(like.new_empty(*lead, n) for n in sizes), like.new_empty(lead), like.new_empty(lead))
        self._pairs = dict(zip((f"{name}_end" for name in fields.PAIRS), made, strict=False))
        outputs, kept = super().forward(given, keep)
        self._pairs = {}
        return (*outputs, *made), (*kept, *made[1:2]) if keep else ()

    def backward(self, given: Given, kept: Sequence[Tensor], grads: Given, wanted: Sequence[bool]) -> Given:
        if self.spec.span is None:
            froms = zip((f"from_{name}" for name in fields.PAIRS), grads[-len(fields.PAIRS) :], strict=True)
            self._pairs = {"write_end": kept[1], **dict(froms)}
        found = super().backward(given, kept, grads, wanted)
        self._pairs = {}
        return found

    def again(self, given: Given) -> tuple[Tensor, ...]:
        streams, stand = self._split(given)
        ends, pairs = self._found(streams, stand)
        return (ends.y, *ends.weights, *(ends.anchor if stand.anchor else ()), *pairs)

    def pairs(self, streams: Given, stand: Stand) -> Found | None:
        """Ends, and pairs; None as in `scan`."""
        found = self.outputs(streams, stand)
        if found is None:
            return None
        ends = Ends(found[0], *self._groups(found[1:])[:3])
        return ends, found[1 + sum(self._counts[:3]) :]


def scan(
    spec: KernelMemory,
    x: Streams,
    cut: Layout,
    slow: Callable[[KernelMemory, Streams], tuple[Tensor, KernelState]],
) -> Found | None:
    """A call by the C code; None where that does not serve, or a guard would have to step in.

    slow   the same call by the framework's operations
    """
    if not serves(spec, x.q) or not orderly(x.retention):
        return None
    tail, grows = x.state.tail, spec.span is None
    # From the first that is there on; a token behind it that was refused has its place, and is told by `fine`.
    there = None if tail is None else tail.ok.cumsum(1) > 0
    if grows and not in_step(x):
        return None
    found = runs(cut, x.q.shape[2], there)
    if found is None:
        return None
    keys, values = x.k, x.v
    if there is not None and not bool(there.any()):  # nothing was read before: no copies of all tokens
        tail = there = None
    if tail is not None:
        keys, values = torch.cat([tail.key, keys], 2), torch.cat([tail.value, values], 2)

    def again(streams: Given, at: Stand) -> Found:
        q, k, v, lr, retention, window, scale, *pairs = streams
        assert q is not None
        assert k is not None
        assert v is not None
        assert scale is not None
        before, state, initial = v.shape[2] - q.shape[2], x.state, x.initial
        if tail is not None:
            state = state._replace(tail=Tail(k[:, :, :before], v[:, :, :before], tail.ok))
        if state.pairs is None:
            initial = at.weights
        else:
            own = type(state.pairs)(*(u.transpose(1, 2) for u in pairs if u is not None))
            state = state._replace(anchor=at.anchor or at.weights, weights=at.weights, pairs=own)
        given = x._replace(
            state=state,
            initial=initial,
            theta=scale.log(),
            q=q,
            k=k[:, :, before:],
            v=v[:, :, before:],
            lr=x.lr if lr is None else lr,
            retention=None if retention is None else Factor(retention),
            window=window,
        )
        with without():
            y, end = slow(spec, given)
        if end.pairs is None:
            return Ends(y, at.weights, (), ()), ()
        return Ends(y, end.weights, (), end.anchor), tuple(u.transpose(1, 2) for u in end.pairs)

    fine, lr, scale = None, x.lr, x.theta.exp()
    whole = tail is None or there is None or torch.equal(there, tail.ok)
    if not (whole and bool(x.fine.all())):
        fine = x.fine.contiguous() if tail is None else torch.cat([tail.ok, x.fine], 1)
        lr = torch.where(x.fine[:, None], lr, 0.0)
    if x.state.pairs is None:
        at = Stand(tuple(w.expand(x.q.shape[0], *w.shape) for w in x.initial), (), (), ())
        span = (x.q, keys, values, None, None, None, scale, None, None, None, None)
        return Scan(spec, found._replace(whole=True), fine, again).pairs(span, at)
    position = int(x.state.position[0])
    count = spec.count(position)
    if x.state.pairs.key.shape[1] < count:
        return None
    pairs = (u[:, :count].transpose(1, 2) for u in x.state.pairs)
    log = None if x.retention is None else x.retention.log
    streams = (x.q, keys, values, lr, log, x.window, scale, *pairs)
    one = Scan(
        spec,
        found,
        fine,
        again,
        count=count,
        room=spec.count(position + x.q.shape[2]),
        opens=position % spec.chunk == 0,
    )
    return one.pairs(streams, Stand(x.state.weights, (), apart(x.state.weights, x.state.anchor), ()))
