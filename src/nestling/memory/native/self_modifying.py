"""The self-modifying memory's scan by the C code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.gates import Factor
from nestling.memory.layout import Layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Ends, Lanes, Stand, stand, states
from nestling.memory.native.runs import Runs, runs
from nestling.memory.native.scan import Cell, orderly, serves
from nestling.memory.norm import EPS
from nestling.memory.state import MemoryState
from nestling.native import HEADERS, without

if TYPE_CHECKING:
    from nestling.memory.self_modifying import SelfModifying, Streams

SOURCE = HEADERS / "self_modifying.c"


def cells(spec: SelfModifying) -> list[Cell]:
    """Of the generators, and of the main memory."""
    return [Cell.of(spec, bank.network) for bank in spec.banks]


@lru_cache(maxsize=64)
def _settings(spec: SelfModifying, shapes: tuple[tuple[int, int], ...]) -> bytes:
    """The C structure with what does not change from call to call. shapes: of each of the state's weights (in, out)."""
    c = fields.SelfModifying(generators=len(spec.generators))
    for number, (cell, bank) in enumerate(zip(cells(spec), spec.banks, strict=True)):
        c.cells[number] = cell.fields(shapes[bank.layers])
    makes = {"key": "k", "value": "v", "query": "q", "lr": "lr", "retention": "retention"}
    for field, name in makes.items():
        setattr(c, field, spec.generators.index(name) if name in spec.generators else -1)
    c.unit_values, c.after_decay = spec.unit_values, spec.rule.erase == "after_decay"
    c.average = spec.averages
    c.lr_max, c.step, c.epsilon = spec.largest_steps[0], spec.rule.step(spec.key_dim), EPS
    return bytes(c)


class Scan(Lanes):
    """One scan. Streams: q, k, v `[lane, head, time, dim]`, log μ `[lane, head, time]` or None, and the read-outs' weights
    `[head, dim, 1]` and biases `[head, 1, 1]`, of lr and retention, None where there is none."""

    source = SOURCE
    entry = "nestling_self_modifying"
    names = fields.ASKED

    def __init__(self, spec: SelfModifying, cut: Runs, fine: Tensor | None, again: Again) -> None:
        super().__init__(spec.name, cut, fine, again)
        self.spec = spec

    def structure(self, streams: Given, stand: Stand) -> fields.SelfModifying:
        (q, *_) = streams
        assert q is not None
        c = fields.SelfModifying.from_buffer_copy(_settings(self.spec, tuple(w.shape[-2:] for w in stand.weights)))
        c.time = q.shape[2]
        return c

    def stores(self, structure: fields.SelfModifying) -> Sequence[tuple[fields.Store, slice]]:
        return [(store, bank.layers) for store, bank in zip(structure.stores, self.spec.banks, strict=True)]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        readout = name.endswith(("_weight", "_bias"))  # shared by the lanes: one of each, to be summed
        return torch.zeros(lanes, *x.shape, dtype=x.dtype) if readout else torch.zeros_like(x)


def scan(
    spec: SelfModifying,
    x: Streams,
    cut: Layout,
    slow: Callable[[SelfModifying, Streams], tuple[Tensor, MemoryState]],
) -> Ends | None:
    """A call by the C code, as `nestling.memory.native.scan.scan`."""
    if spec.static or spec.read == "boundary":
        return None
    if not (all(serves(cell, x.q) for cell in cells(spec)) and orderly(x.momentum)):
        return None
    found = runs(cut, x.q.shape[2])
    if found is None:
        return None

    def again(streams: Given, at: Stand) -> Ends:
        q, k, v, mu, *readout = streams
        assert q is not None
        assert k is not None
        assert v is not None
        half = len(readout) // 2
        pairs = zip(("lr", "retention"), readout[:half], readout[half:], strict=True)
        start, state = states(x.state, x.start, at)
        given = x._replace(
            start=start,
            state=state,
            q=q,
            k=k,
            v=v,
            momentum=None if mu is None else Factor(mu),
            readout={gate: (w, b) for gate, w, b in pairs if w is not None and b is not None},
        )
        with without():
            return Ends.of(slow(spec, given))

    (w_lr, b_lr), (w_alpha, b_alpha) = x.readout["lr"], x.readout.get("retention", (None, None))
    mu = None if x.momentum is None else x.momentum.log
    streams = x.q, x.k, x.v, mu, w_lr, w_alpha, b_lr, b_alpha
    fine = None if bool(x.fine.all()) else x.fine.contiguous()
    return Scan(spec, found, fine, again).scan(streams, stand(x.state, x.start, found))
