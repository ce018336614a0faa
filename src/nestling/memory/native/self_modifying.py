"""The self-modifying memory's scan by the C code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Again, Lanes, Stand
from nestling.memory.native.runs import Runs
from nestling.memory.native.scan import Cell
from nestling.memory.norm import EPS
from nestling.native import HEADERS

if TYPE_CHECKING:
    from nestling.memory.self_modifying import SelfModifying

SOURCE = HEADERS / "self_modifying.c"


def cells(spec: SelfModifying) -> list[Cell]:
    """Of the generators, and of the main memory."""
    return [Cell.of(spec, bank.network) for bank in spec.banks]


class Scan(Lanes):
    """One scan. Streams: q, k, v `[lane, head, time, dim]`, log μ `[lane, head, time]` or None, and the read-outs' weights
    `[head, dim, 1]` and biases `[head, 1, 1]`, of lr and retention, None where there is none."""

    source = SOURCE
    entry = "nestling_self_modifying"
    names = fields.ASKED

    def __init__(self, spec: SelfModifying, cut: Runs, again: Again) -> None:
        super().__init__(spec.name, cut, again)
        self.spec = spec

    def structure(self, streams: Given, stand: Stand) -> fields.SelfModifying:
        spec, (q, *_) = self.spec, streams
        assert q is not None
        c = fields.SelfModifying(time=q.shape[2], generators=len(spec.generators))
        for number, (cell, bank) in enumerate(zip(cells(spec), spec.banks, strict=True)):
            c.cells[number] = cell.fields([(w.shape[-2], w.shape[-1]) for w in stand.weights[bank.layers]])
        makes = {"key": "k", "value": "v", "query": "q", "lr": "lr", "retention": "retention"}
        for field, name in makes.items():
            setattr(c, field, spec.generators.index(name) if name in spec.generators else -1)
        c.unit_values, c.after_decay = spec.unit_values, spec.rule.erase == "after_decay"
        c.lr_max, c.step, c.epsilon = spec.lr_max, spec.rule.step(spec.key_dim), EPS
        return c

    def stores(self, structure: fields.SelfModifying) -> Sequence[tuple[fields.Store, slice]]:
        return [(store, bank.layers) for store, bank in zip(structure.stores, self.spec.banks, strict=True)]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        readout = name.endswith(("_weight", "_bias"))  # shared by the lanes: one of each, to be summed
        return torch.zeros(lanes, *x.shape, dtype=x.dtype) if readout else torch.zeros_like(x)
