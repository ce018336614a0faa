"""TNT at speed: each memory by its own engine, projections among them, with all of a call's shards side by side where they gain.

Equal to its reference for lanes at any positions, resets and invalid tokens anywhere, and any split of a stream: which token
begins a shard is counted from the lane's own position 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory import native, projection
from nestling.memory.gates import Gates
from nestling.memory.native.lanes import together
from nestling.memory.norm import l2_norm
from nestling.memory.protocol import Call, Memory
from nestling.memory.report import Report
from nestling.memory.shards import pack, unfold
from nestling.memory.spec import MemorySpec
from nestling.memory.state import Weights
from nestling.memory.tnt import Streams, Tnt, TntState
from nestling.memory.unit import unit_rows
from nestling.processor import CORES


def scan(spec: Tnt, x: Streams, *, tile: int | None = None, report: Report | None = None) -> tuple[Tensor, TntState]:
    """Memory by memory."""
    time = x.q.shape[2]
    if time == 0:
        return x.v.new_zeros(x.v.shape), x.state
    alive, before, position = places(x.state.position, x.reset, x.valid, time)
    begins = {s: _some(alive & (before % s == 0)) for s in spec.shards if s is not None}

    asked: dict[int | None, Tensor] = dict.fromkeys(spec.shards, x.q)
    projections = []
    for shard, p in zip(spec.lengths, x.state.projection, strict=True):
        asked[shard], p = _projected(spec, x, p, shard, begins[shard], alive)
        projections.append(p)

    skipped = (~x.fine & alive.to(x.fine.device)).sum(1)
    parts: list[Any] = []
    total, faults = None, x.state.faults + skipped
    names = [part.name for part in spec.parts] if report is not None else []
    for n, own in enumerate(spec.shards):
        options: dict[str, Any] = {"tile": tile}
        if report is not None:
            options["report"] = report.scope(names[n])
        one = One(spec.memories[n], own, x.w0[n], x.state.parts[n], x.k, x.v, x.gates[n])
        with together(len(spec.memories)):
            y, new = _read(one, asked[own], x.reset if own is None else begins[own], x, options)
        total = y if total is None else total + y
        parts.append(new)
        faults = faults + new.faults - x.state.parts[n].faults - skipped
    assert total is not None
    if report is not None:
        report.count(faults=faults - x.state.faults)
    return total, TntState(tuple(parts), tuple(projections), position, faults)


def _projected(
    spec: Tnt, x: Streams, p: Tensor, shard: int, begins: Tensor | None, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """What the memories of a length of shards are asked with, and the last P."""
    if x.q.shape[2] == 1:
        q, fine = projection.finite(x.q)
        counts = _some(~(x.fine & alive.to(x.fine.device))[:, 0])
        p = projection.step(
            p, x.k[:, :, 0], None if begins is None else begins[:, 0], None if counts is None else ~counts
        )
        read = projection.answered(q @ p, fine)
        return (l2_norm(read) if spec.projection == "normalized" else read), p
    w0 = (p.new_zeros(p.shape[1:]),)
    one = One(spec.projector, shard, w0, projection.state(p), x.k, x.k, projection.steps(x.k))
    read, end = _read(one, x.q, begins, x, {})
    return (unit_rows(read) if spec.projection == "normalized" else read), end.weights[0]


def places(position: Tensor, reset: Tensor | None, valid: Tensor | None, time: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count and the lane's position before each (bool and int64 `[lane, time]`, CPU), and after the call."""
    alive = torch.ones(len(position), time, dtype=torch.bool) if valid is None else valid.cpu()
    rank = alive.long().cumsum(1) - alive.long()
    before = position[:, None] + rank
    after = position + alive.sum(1)
    if reset is not None:
        last = torch.where(reset.cpu() & alive, rank, -1).cummax(1).values
        before = torch.where(last < 0, before, rank - last)
        after = torch.where(last[:, -1] < 0, after, alive.sum(1) - last[:, -1])
    return alive, before, after


class One(NamedTuple):
    """One memory, and what it reads besides queries."""

    memory: Memory
    shard: int | None
    w0: Weights
    state: Any
    k: Tensor
    v: Tensor
    gates: Gates


def _read(one: One, q: Tensor, begins: Tensor | None, x: Streams, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """Answers and the new state: in rows of a shard if its shards make several, else in a row, reset where they begin.

    A cache is read in a row: of rows it would come back with room for the longest.
    """
    memory, shard, w0, state, k, v, gates = one

    def in_order() -> tuple[Tensor, Any]:
        return memory.scan(w0, q, k, v, gates, state, reset=begins, valid=x.valid, **options)

    alone = memory.growth == "linear" or "report" in options
    if shard is not None and begins is not None and q.shape[2] > 1 and not alone:
        if in_a_row(one, q, x):
            try:
                with native.only():
                    return in_order()
            except native.Declined:  # the framework's way is many times as slow in a row
                pass
        packing = pack(begins, x.valid, shard)
        if packing is not None:

            def run(inputs: Any, state: Any, **masks: Any) -> tuple[Tensor, Any]:
                q, k, v, gates = inputs
                return memory.scan(w0, q, k, v, Gates(**gates), state, **masks, **options)

            def start(count: int) -> Any:
                return memory.start(w0, count)

            inputs = (q, k, v, dict(gates.items()))
            return unfold(run, packing, start, state, _first(begins, x.valid), inputs)
    return in_order()


def in_a_row(one: One, q: Tensor, x: Streams) -> bool:
    """Whether there is C code for a memory, and work for all cores in its lanes and heads. It goes on to the next shard as to
    the next tile: rows would bring nothing then but copies of all that is read, and weights for each. Of cores, not of threads:
    what a checkpoint makes again has to go the same way."""
    if torch.compiler.is_compiling() or not isinstance(one.memory, MemorySpec):
        return False
    if q.shape[0] * q.shape[1] < CORES or not (x.valid is None or bool(x.valid.all())):
        return False
    return one.memory._piece(Call(one.w0, q, one.k, one.v, one.gates, one.state, None, None), None) is None


def _first(begins: Tensor, valid: Tensor | None) -> Tensor:
    """Whether a shard begins at the lane's first valid token, bool `[lane]`."""
    if valid is None:
        return begins[:, 0]
    alive = valid.cpu()
    return (begins & alive & (alive.cumsum(1) == 1)).any(1)


def _some(mask: Tensor) -> Tensor | None:
    """The mask, or None where looking is free and nothing is set."""
    free = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return mask if not free or bool(mask.any()) else None
