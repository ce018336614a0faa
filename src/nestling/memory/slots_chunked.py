"""Slot memories at speed: tile after tile, equal to their reference; one token is a tile of one."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory import native
from nestling.memory.coefficients import Coefficients, coefficients, each, products
from nestling.memory.gates import Factor
from nestling.memory.inputs import border_guard, lanes_where, surely, unharmed
from nestling.memory.layout import layout
from nestling.memory.report import Report
from nestling.memory.slots import SlotMemory, Streams, Tile, refused
from nestling.memory.state import MemoryState, Weights
from nestling.memory.tiles import back, by_groups, gather, group_size, series

TILE = 64  # tokens per product
SHORT = 16  # the same where each slot has coefficients of its own


class Running(NamedTuple):
    """What goes from tile to tile."""

    anchor: Weights
    weights: Weights
    faults: Tensor


def scan(
    spec: SlotMemory, x: Streams, *, tile: int | None = None, report: Report | None = None
) -> tuple[Tensor, MemoryState]:
    """Tile by tile."""
    time = x.lr.shape[2]
    silence = x.lr.new_zeros(*x.lr.shape[:3], spec.value_dim)
    if time == 0:
        return silence, x.state
    if time == 1 and report is None:
        return step(spec, x)
    longest = tile or (SHORT if spec.slotwise else TILE)
    cut = layout(x.state.position, time, x.reset, x.valid, period=spec.chunk, tile=longest, halo=0)
    count = cut.tokens.shape[1]
    if count == 0:  # no valid token at all
        return silence, x.state

    skipped = (~x.fine if x.valid is None else ~x.fine & x.valid).sum(1)
    if report is None and (found := native.scan_slots(spec, x, cut, scan)) is not None:
        return found.y, MemoryState(*found.stand, None, cut.position, x.state.faults + skipped)

    def pick(u: Tensor) -> Tensor:
        return gather(u, cut.tokens, cut)

    alive = None
    if cut.ok is not None or not surely(x.fine):
        alive = pick(x.fine.unsqueeze(1)).squeeze(1)
        alive = alive if cut.ok is None else alive & cut.ok.to(alive.device)
    lr, retention = pick(x.lr), None if x.retention is None else x.retention.map(pick)
    lr, retention = masked(lr, retention, None if alive is None else alive[:, None, ..., None])
    size = group_size(count)  # taken apart at once, as the gradient of a slice is as large as the whole
    tokens = [torch.split(pick(u), size, 2) for u in x.tokens]
    steps = torch.split(lr, size, 2)
    parts = (
        None
        if retention is None
        else [torch.split(u, size, 2) for u in (retention.log, retention.zero, retention.value) if u is not None]
    )

    def group(first: int, last: int, running: Running) -> tuple[Tensor, Running, list[Weights]]:
        anchor, weights, faults = running
        number = first // size
        factors = None if parts is None else Factor(*(part[number] for part in parts))
        matrices = [[tile_c for tile_c in c.each()] for c in _matrices(spec, steps[number], factors)]
        rows = [each(u[number], last - first) for u in tokens]
        rates = each(steps[number], last - first)
        outputs, notes = [], list[Weights]()
        for n in range(last - first):
            if cut.reset is not None:
                fresh = cut.reset[first + n]
                anchor = lanes_where(fresh, x.start.weights, anchor)
                weights = lanes_where(fresh, x.start.weights, weights)
            rate = rates[n]
            own = tuple(u for row in rows if (u := row[n]) is not None)
            assert rate is not None
            moved = spec.tile(
                Tile(own, rate.unbind(-1), [c[n] for c in matrices], anchor, weights, cut.begins[first + n][0])
            )
            weights, border = moved.weights, cut.border[first + n]
            outputs.append(moved.y)
            if bool(border.any()):
                weights = lanes_where(border, spec.settle(weights), weights)
                anchor, weights, _, broken = border_guard(border, anchor, weights, ())
                faults = faults + broken
            lost = ~moved.sound
            faults = faults + (lost if alive is None else lost & alive[:, first + n]).sum(1)
            if report is not None:
                notes.append((moved.surprise, rate.detach().mean(-1) * moved.size))
        return torch.stack(outputs, 2), Running(anchor, weights, faults), notes

    y, running, notes = by_groups(group, count, Running(x.state.anchor, x.state.weights, x.state.faults))
    faults = running.faults + skipped
    if report is not None:
        surprise, update = series(notes, cut, time)
        report.add(surprise=surprise, update=update, lr=x.lr.mean(-1))
        if x.retention is not None:
            report.add(retention=x.retention.plain().mean(-1))
        report.count(faults=faults - x.state.faults)
    return back(y, cut, time), MemoryState(running.anchor, running.weights, (), None, cut.position, faults)


def masked(lr: Tensor, retention: Factor | None, alive: Tensor | None) -> tuple[Tensor, Factor | None]:
    """Gates under which tokens that are not alive change nothing."""
    if alive is None:
        return lr, retention
    return torch.where(alive, lr, 0.0), None if retention is None else retention.masked(alive)


def _matrices(spec: SlotMemory, lr: Tensor, retention: Factor | None) -> list[Coefficients]:
    """Decays of `[lane, head, tile, place, pass]` gates for each pass; steps are put on the rows. Per slot, they have slots as
    their last dimension."""
    if spec.per_slot and retention is not None:
        d = products(retention.map(lambda gate: gate.mT)).movedim(-3, -1)
        return [Coefficients(d[..., 0, :], None, None, d[..., 1:, :], None, None, lr[..., 0])]
    found = []
    for n, rate in enumerate(lr.unbind(-1)):
        kept = retention
        if retention is not None:
            at = min(n, retention.log.shape[-1] - 1)
            kept = retention.map(lambda gate, at=at: gate[..., at])  # type: ignore[misc]
        found.append(coefficients(rate, kept, None, None, alive=None, present=None, erases=True))
    return found


def step(spec: SlotMemory, x: Streams) -> tuple[Tensor, MemoryState]:
    """A scan of length 1, lanes at any positions: the same work at every position."""
    return unharmed(partial(_token, spec), x, partial(refused, t=0))


def _token(spec: SlotMemory, x: Streams, gone: Tensor | None) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    anchor, weights, position = x.state.anchor, x.state.weights, x.state.position
    alive = None if x.valid is None else x.valid[:, 0]
    if x.reset is not None:
        fresh = x.reset[:, 0] if alive is None else x.reset[:, 0] & alive
        anchor = lanes_where(fresh, x.start.weights, anchor)
        weights = lanes_where(fresh, x.start.weights, weights)
        position = torch.where(fresh.cpu(), 0, position)
    live = x.fine if alive is None else x.fine & alive.to(x.fine.device)[:, None]
    lr, retention = masked(x.lr, x.retention, None if surely(live) else live[:, None, :, None])
    matrices = _matrices(
        spec, lr.unsqueeze(2), None if retention is None else retention.map(lambda gate: gate.unsqueeze(2))
    )
    moved = spec.tile(Tile(x.tokens, lr.unbind(-1), [c.each()[0] for c in matrices], anchor, weights, False))
    y, weights = moved.y, moved.weights
    if alive is None:
        position = position + 1
        closing = position % spec.chunk == 0
    else:
        here = alive.cpu()
        position = torch.where(here, position + 1, position)
        closing = here & (position % spec.chunk == 0)
        y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    if torch.compiler.is_compiling() or bool(closing.any()):
        weights = lanes_where(closing, spec.settle(weights), weights)
    stood, (anchor, weights, _, broken) = anchor, border_guard(closing, anchor, weights, (), gone)
    if spec.read == "after" and not surely(~broken):  # they answer as they stand
        y = torch.where(broken.view(-1, 1, 1, 1), spec.answer(x.tokens, stood, stood), y)
    lost = ~(x.fine & moved.sound | broken[:, None])
    if alive is not None:
        lost = lost & alive.to(lost.device)[:, None]
    faults = x.state.faults + lost.sum(1) + broken
    return y, MemoryState(anchor, weights, (), None, position, faults), broken
