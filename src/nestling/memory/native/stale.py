"""Memories that answer from the start of their chunk, of long chunks: what they read is one network for all of a chunk's tokens,
and apart from what they write. The C code writes, without queries; the framework reads, lane by lane, and reads again for the way
back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestling.memory.features import Identity
from nestling.memory.gates import Factor
from nestling.memory.inputs import Inputs
from nestling.memory.layout import layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Ends, Stand, Stream, in_step, stand, states
from nestling.memory.native.runs import runs
from nestling.memory.native.scan import Cell, Scan, orderly
from nestling.memory.native.scan import serves as serves_cell
from nestling.memory.networks.base import at
from nestling.memory.retentions import Decay, Full
from nestling.memory.state import MemoryState, Weights
from nestling.native import without

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

LONG = 128  # tokens of a chunk, at least: between chunks all weights are kept
TILE = 64  # tokens that are written together
MADE = 6  # numbers that are made of a tile for each of its tokens and each of the first layer's outputs

Slow = Callable[["MemorySpec", Inputs], tuple[Tensor, MemoryState]]


def serves(spec: MemorySpec, x: Tensor, call: Stream) -> bool:
    """Whether a call is read and written apart, with such choices and tensors, on this machine."""
    stale = spec.read == "boundary" and len(spec.periods) == 1 and spec.periods[0] >= LONG
    plain = isinstance(spec.retention, Decay | Full) and spec.bias.window == 1 and type(spec.features) is Identity
    return stale and plain and in_step(call) and serves_cell(_cell(spec), x)


def _cell(spec: MemorySpec) -> Cell:
    """As what is written depends on it, which nobody reads."""
    return Cell.of(replace(spec, read="after"), spec.network)


class Writing(Scan):
    """A scan without queries."""

    def group(self, stand: Stand) -> int:
        """As many that what is kept of all memories between groups takes the room of what is made of one's tiles in a group."""
        tiles, rows = self.cut.table.shape[1], MADE * self.cut.longest * stand.weights[0].shape[-1]
        return max(1, isqrt(tiles * self.keeps(stand) // rows))

    def structure(self, streams: Given, stand: Stand) -> fields.Scan:
        _, k, *others = streams
        return super().structure((k, k, *others), stand)


def scan(spec: MemorySpec, x: Inputs, slow: Slow) -> tuple[Tensor, MemoryState] | None:
    """A call, chunk by chunk; None where this does not serve, or a guard would have to step in.

    slow   the same by the framework's operations
    """
    position, time = x.state.position, x.q.shape[2]
    if not serves(spec, x.q, x) or not orderly(x.retention, x.momentum):
        return None
    period = spec.periods[0]
    first = period - int(position[0]) % period
    state, outputs = x.state, list[Tensor]()
    for part in _chunks(x, [b - a for a, b in pairwise([0, *range(first, time, period), time])]):
        outputs.append(_read(spec, state.anchor, part.q))
        after = _write(spec, part._replace(state=state), slow)
        if after is None:
            return None
        state = after
    return torch.cat(outputs, 2), state


def _read(spec: MemorySpec, weights: Weights, q: Tensor) -> Tensor:
    """Answers to all of these queries, one lane's inside at a time."""
    if not torch.is_grad_enabled():
        return spec.network.apply(at(weights), q)

    def read(q: Tensor, *weights: Tensor) -> Tensor:
        return spec.network.apply(at(weights), q)

    lanes = zip(torch.split(q, 1), *(torch.split(w, 1) for w in weights), strict=True)
    found = [checkpoint(read, *lane, use_reentrant=False, preserve_rng_state=False) for lane in lanes]
    return torch.cat(found)


def _chunks(x: Inputs, sizes: list[int]) -> list[Inputs]:
    """A call's tokens chunk by chunk. Taken apart at once, as the gradient of a slice is as large as the whole."""
    if len(sizes) == 1:
        return [x]

    def split(u: Any) -> Any:
        if isinstance(u, Factor):
            return [Factor(*parts) for parts in zip(split(u.log), split(u.zero), split(u.value), strict=True)]
        return (None,) * len(sizes) if u is None else torch.split(u, sizes, 2)

    names = ("q", "k", "v", "lr", "retention", "momentum", "erase")
    rows = zip(*(split(getattr(x, name)) for name in names), strict=True)
    fine = torch.split(x.fine, sizes, 1)
    return [x._replace(fine=own, **dict(zip(names, row, strict=True))) for own, row in zip(fine, rows, strict=True)]


def _write(spec: MemorySpec, x: Inputs, slow: Slow) -> MemoryState | None:
    """The state behind these tokens of one chunk; None as in `scan`."""
    time = x.q.shape[2]
    cut = layout(x.state.position, time, None, None, period=spec.periods, tile=TILE, halo=0)
    found = runs(cut, time)
    if found is None:
        return None

    def again(streams: Given, at: Stand) -> Ends:
        _, k, v, lr, retention, mu, erase, *_ = streams
        assert k is not None
        assert v is not None
        assert lr is not None
        start, state = states(x.state, x.start, at)
        given = x._replace(
            reset=None,
            valid=None,
            start=start,
            state=state,
            k=k,
            v=v,
            lr=lr,
            retention=None if retention is None else Factor(retention),
            momentum=None if mu is None else Factor(mu),
            erase=erase,
        )
        with without():
            return Ends.of(slow(spec, given))

    fine, lr, erase = None, x.lr, x.erase
    if not bool(x.fine.all()):
        fine, acts = x.fine.contiguous(), x.fine[:, None]
        lr = torch.where(acts, lr, 0.0)
        erase = None if erase is None else torch.where(acts, erase, 0.0)
    retention, momentum = (None if gate is None else gate.log for gate in (x.retention, x.momentum))
    streams = None, x.k, x.v, lr, retention, momentum, erase, None, None, None, None
    one = Writing(_cell(spec), None, found, fine, again)
    ends = one.scan(streams, stand(x.state, x.start, found))
    if ends is None:
        return None
    return x.state._replace(
        anchor=ends.stand[0],
        weights=ends.weights,
        momentum=ends.momentum,
        position=cut.position,
        faults=x.state.faults + (~x.fine).sum(1),
    )
