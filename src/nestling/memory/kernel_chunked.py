"""The engine of memories over exponential features, equal to the reference: tiles of attention over pairs.

Within a chunk every u is taken at the anchor, so that a tile is two products with the pairs before it: one of its keys, at the
anchor's a, for the errors; one of its queries. Its own pairs come in by the coefficient matrix A of `coefficients`, with the
columns of a window's earlier tokens, as in every memory of the linear family:

    z(q_t) = γ_t q_t W_0 + Σ_old γ_t a_j κ(k_j, q_t) u_j + Σ_i A[t,i] κ(k_i, q_t) u_i

What changes with time is a alone, one number per pair and head; keys and u are written once. Pairs are numbered as they come in
a call, with room for a window's in front of each tile, and brought into the state's order at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestling.memory.coefficients import Coefficients, coefficients
from nestling.memory.inputs import lanes_where, overflowed, surely
from nestling.memory.kernel import TILE, KernelMemory, KernelState, Pairs, Streams
from nestling.memory.kernel_sum import Sum
from nestling.memory.layout import Layout, layout
from nestling.memory.native import kernel as native
from nestling.memory.networks.base import at
from nestling.memory.report import Report
from nestling.memory.state import Weights
from nestling.memory.tile import gradients, surprise_and_update
from nestling.memory.tiles import back, behind, by_groups, carried, gather, own_tokens, series


class Tiles(NamedTuple):
    """Inputs cut into tiles `[lane, head, tile, place, …]`; present bool `[lane, 1, tile, halo + L]`: a token acts there."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    present: Tensor

    def number(self, n: int) -> Tiles:
        return Tiles(*(part[:, :, n] for part in self))


class Running(NamedTuple):
    """What goes from tile to tile: a of every pair of the call `[lane, head, pair]`, and the pairs so far in parts."""

    anchor: Weights
    weights: Weights
    weight: Tensor
    still: Tensor
    keys: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    faults: Tensor


class Numbers(NamedTuple):
    """Where pairs stand in a call: `slot [lane, tile, halo + L]`, and at its end which are there, bool `[lane, pair]`."""

    slot: Tensor
    there: Tensor


@dataclass
class FirstLayer:
    """Stands for the first layer's weights in a product `k @ it`."""

    spec: KernelMemory
    learned: Tensor
    pairs: list[Sum]
    theta: Tensor

    def __rmatmul__(self, k: Tensor) -> Tensor:
        return k @ self.learned + self.spec.sum(k, self.theta, None, self.pairs, [])


def scan(
    spec: KernelMemory, x: Streams, *, tile: int | None = None, report: Report | None = None
) -> tuple[Tensor, KernelState]:
    """Tile by tile; see the module."""
    time = x.q.shape[2]
    silence = x.v.new_zeros(*x.v.shape[:3], spec.value_dim)
    if time == 0:
        return silence, x.state
    size = tile or TILE
    period = spec.chunk if spec.span is None or spec.read == "boundary" else size  # else no chunk begins anywhere
    cut = layout(x.state.position, time, x.reset, x.valid, period=period, tile=size, halo=spec.halo)
    if cut.tokens.shape[1] == 0:  # no valid token at all
        return silence, x.state
    if report is None and (found := native.scan(spec, x, cut, scan)) is not None:
        ends, own = found
        tail = None if x.state.tail is None else carried(x.state.tail, x.k, x.v, x.fine, cut)
        end = x.state._replace(tail=tail, position=cut.position, faults=x.state.faults + _skipped(x))
        if x.state.pairs is not None:
            anchor, weights, _ = ends.stand
            end = end._replace(anchor=anchor, weights=weights, pairs=Pairs(*(part.transpose(1, 2) for part in own)))
        return ends.y, end
    cells = _tiles(spec, x, cut)
    run = _grown if spec.span is None else _spanned
    y, anchor, weights, pairs, faults, notes = run(spec, x, cut, cells)
    y = back(y, cut, time)
    faults = faults + _skipped(x)
    if report is not None:
        surprise, update = series(notes, cut, time)
        report.add(surprise=surprise, update=update, lr=x.lr)
        if x.retention is not None:
            report.add(retention=x.retention.plain())
        report.count(faults=faults - x.state.faults)
    tail = None if x.state.tail is None else carried(x.state.tail, x.k, x.v, x.fine, cut)
    return y, KernelState(anchor, weights, pairs, tail, cut.position, faults)


def _skipped(x: Streams) -> Tensor:
    """How many tokens of each lane the token guard left out."""
    return (~x.fine if x.valid is None else ~x.fine & x.valid).sum(1)


Result = tuple[Tensor, Weights, Weights, Pairs | None, Tensor, list[Weights]]


def _tiles(spec: KernelMemory, x: Streams, cut: Layout) -> Tiles:
    keys, values, usable = behind(x.state.tail, x.k, x.v, x.fine)
    own = own_tokens(cut, spec.halo)
    present = gather(usable.unsqueeze(1), cut.tokens, cut)
    if cut.ok is not None:
        present = present & cut.ok.to(present.device).unsqueeze(1)
    keys, values = gather(keys, cut.tokens, cut), gather(values, cut.tokens, cut)
    return Tiles(gather(x.q, own, cut), keys, values, gather(x.lr, own, cut), present)


def _places(spec: KernelMemory, x: Streams, cut: Layout) -> np.ndarray:
    """Tokens of the lane's open chunk before each tile, `[lane, tile]`."""
    lanes, tiles = cut.tokens.shape[:2]
    own = np.full((lanes, tiles), cut.size) if cut.ok is None else cut.ok[..., -cut.size :].sum(-1).numpy()
    place, found = (x.state.position % spec.chunk).numpy().copy(), np.zeros((lanes, tiles), dtype=np.int64)
    for n in range(tiles):
        if cut.reset is not None:
            place = np.where(cut.reset[n].numpy(), 0, place)
        found[:, n] = place
        place = (place + own[:, n]) % spec.chunk
    return found


def _grown(spec: KernelMemory, x: Streams, cut: Layout, cells: Tiles) -> Result:
    assert x.state.pairs is not None
    old, halo, count = x.state.pairs, spec.halo, cut.tokens.shape[1]
    numbers = _numbers(spec, x, cut, old.key.shape[1])
    slot = numbers.slot.to(x.q.device)
    alive = cells.present[..., halo:]
    lr = torch.where(alive, cells.lr, 0.0)
    own = own_tokens(cut, spec.halo)
    retention = None if x.retention is None else x.retention.map(lambda part: gather(part, own, cut)).masked(alive)
    window = None if x.window is None else gather(x.window, own, cut)
    if halo and window is None:
        window = lr.new_ones(*lr.shape, halo + 1)
    matrices = coefficients(lr, retention, None, window, alive=alive, present=cells.present, erases=False).each()
    room = old.key.shape[1] + count * (halo + cut.size)

    def wide(part: Tensor) -> Tensor:
        return torch.nn.functional.pad(part.transpose(1, 2), (0, room - part.shape[1]))

    running = Running(
        x.state.anchor,
        x.state.weights,
        wide(old.weight),
        wide(old.anchor),
        (old.key.transpose(1, 2),),
        (old.write.transpose(1, 2),),
        x.state.faults,
    )

    def group(first: int, last: int, running: Running) -> tuple[Tensor, Running, list[Weights]]:
        outputs, notes = [], list[Weights]()
        for n in range(first, last):
            y, running, note = _tile(spec, x, cut, cells.number(n), matrices[n], slot[:, n], n, running)
            outputs.append(y)
            notes.append(note)
        return torch.stack(outputs, 2), running, notes

    y, running, notes = by_groups(group, count, running)
    keys, writes = torch.cat(running.keys, 2), torch.cat(running.writes, 2)
    parts = (keys, writes, running.weight, running.still)
    pairs = Pairs(*(_ordered(part.transpose(1, 2), numbers.there) for part in parts))
    return y, running.anchor, running.weights, pairs, running.faults, notes


def _tile(
    spec: KernelMemory, x: Streams, cut: Layout, cell: Tiles, c: Coefficients, slot: Tensor, n: int, running: Running
) -> tuple[Tensor, Running, Weights]:
    anchor, weights, weight, still, keys, writes, faults = running
    halo = spec.halo
    if cut.reset is not None and bool(cut.reset[n].any()):
        fresh = cut.reset[n]
        anchor = lanes_where(fresh, x.start.weights, anchor)
        weights = lanes_where(fresh, x.start.weights, weights)
        kept = ~fresh.to(weight.device)[:, None, None]
        weight, still = torch.where(kept, weight, 0.0), torch.where(kept, still, 0.0)
    now, stood = (_sums(keys, writes, a) for a in (weight, still))
    first = FirstLayer(spec, anchor[0], stood, x.theta)
    found = gradients(spec.network, spec.bias, [first, *anchor[1:]], cell.k, cell.v)  # type: ignore[list-item]
    finite = found.finite.all(1, keepdim=True)
    keep = finite & cell.present
    found = found.only(keep)
    k = torch.where(keep.unsqueeze(-1), cell.k, 0.0)
    u = -found.errors[0]
    assert c.write is not None
    write = c.write * keep.unsqueeze(-2)

    if spec.read == "boundary":
        y = spec.network.apply(at([first, *anchor[1:]]), cell.q)  # type: ignore[list-item]
    else:
        rows = slice(1, None) if spec.read == "after" else slice(None, -1)
        share = None if c.keep is None else c.keep[..., rows, None]
        columns = write[..., rows, :]

        def linear(layer: int, h: Tensor) -> Tensor:
            z = h @ weights[layer]
            z = z if share is None else share * z
            if layer > 0:
                return z - (columns * (h @ found.inputs[layer].mT)) @ found.errors[layer]
            return z + spec.sum(h, x.theta, share, now, [Sum(k, u, columns)])

        y = spec.network.apply(linear, cell.q)

    last, share = write[..., -1, :], None if c.keep is None else c.keep[..., -1, None]
    if share is not None:
        weights = tuple(share.unsqueeze(-1) * w for w in weights)
        weight = share * weight
    moved = (
        w - (last.unsqueeze(-1) * h).mT @ d
        for w, h, d in zip(weights[1:], found.inputs[1:], found.errors[1:], strict=True)
    )
    weights = (weights[0], *moved)
    weight = weight.scatter_add(-1, slot.unsqueeze(1).expand_as(last), last)
    border = cut.border[n]
    if cut.size == 1 or bool(border.any()):
        weights, weight, broken = _guarded(anchor, weights, still, weight)
        if spec.read == "after" and cut.size == 1 and not surely(~broken):  # they answer as they stand
            left = spec.network.apply(at([first, *anchor[1:]]), cell.q)  # type: ignore[list-item]
            y = torch.where(broken.view(-1, 1, 1, 1), left, y)
        anchor = lanes_where(border, weights, anchor)
        still = torch.where(border.to(weight.device)[:, None, None], weight, still)
        faults = faults + broken
    lost = ~finite[:, 0, halo:] & cell.present[:, 0, halo:]
    faults = faults + lost.sum(1)
    note = surprise_and_update(found, torch.where(keep[..., halo:], cell.lr, 0.0), halo)
    return y, Running(anchor, weights, weight, still, (*keys, k), (*writes, u), faults), note


def _sums(keys: Sequence[Tensor], writes: Sequence[Tensor], weight: Tensor) -> list[Sum]:
    """The pairs so far, in parts, with weights `[lane, head, room]` of all of them."""
    sizes = [part.shape[2] for part in keys]
    weights = torch.split(weight[..., : sum(sizes)].unsqueeze(2), sizes, -1)
    return [Sum(*part) for part in zip(keys, writes, weights, strict=True)]


def _guarded(anchor: Weights, weights: Weights, still: Tensor, weight: Tensor) -> tuple[Weights, Tensor, Tensor]:
    """The border guard: lanes whose weights or pairs are not finite go back to the start of the chunk."""
    broken = overflowed((weight, *weights), ())
    weights = lanes_where(broken, anchor, weights)
    return weights, torch.where(broken[:, None, None], still, weight), broken


def _numbers(spec: KernelMemory, x: Streams, cut: Layout, capacity: int) -> Numbers:
    """See `Numbers`. A tile has room for halo + L pairs; those in front are new where its chunk opens with it."""
    halo, wide = spec.halo, spec.halo + cut.size
    lanes, tiles = cut.tokens.shape[:2]
    places = _places(spec, x, cut)
    slot = np.broadcast_to(capacity + np.arange(tiles)[:, None] * wide + np.arange(wide), (lanes, tiles, wide)).copy()
    there = np.zeros((lanes, capacity + tiles * wide), dtype=bool)
    for lane in range(lanes):
        position = int(x.state.position[lane])
        count = spec.count(position)
        there[lane, :count] = True
        place = position % spec.chunk
        opened = np.arange(count - place - halo, count) if place else np.arange(0)
        for n in range(tiles):
            if cut.reset is not None and bool(cut.reset[n, lane]):
                there[lane, : slot[lane, n, 0]] = False
            own = cut.size if cut.ok is None else int(cut.ok[lane, n, halo:].sum())
            if own == 0:
                continue
            if places[lane, n] == 0:
                opened = slot[lane, n, :halo]
                there[lane, opened] = True
            elif halo:
                slot[lane, n, :halo] = opened[-halo:]
            mine = slot[lane, n, halo : halo + own]
            there[lane, mine] = True
            opened = np.concatenate([opened, mine])
    return Numbers(torch.from_numpy(slot), torch.from_numpy(there))


def _ordered(part: Tensor, there: Tensor) -> Tensor:
    """Pairs `[lane, pair, …]` that are there, first and in order; zeros behind."""
    if bool(there.all()):
        return part
    capacity = int(there.sum(1).max())
    order = (~there).long().argsort(dim=1, stable=True)[:, :capacity].to(part.device)
    filled = (torch.arange(capacity) < there.sum(1)[:, None]).to(part.device)
    lanes = torch.arange(part.shape[0], device=part.device)[:, None]
    return torch.where(filled.view(*filled.shape, *[1] * (part.dim() - 2)), part[lanes, order], 0.0)


def _spanned(spec: KernelMemory, x: Streams, cut: Layout, cells: Tiles) -> Result:
    """Every tile by itself: gradients at the initial weights, and a band of them for every token."""
    assert spec.span is not None
    count, halo = cut.tokens.shape[1], spec.halo
    place = torch.from_numpy(_places(spec, x, cut)).to(x.q.device)
    column = torch.arange(halo + cut.size, device=x.q.device)
    ends = column[halo:].expand(*place.shape, -1)  # the last token that a read knows
    if spec.read == "before":
        ends = ends - 1
    elif spec.read == "boundary":
        ends = (halo - place - 1).unsqueeze(-1).expand_as(ends)
    behind = ends.unsqueeze(-1) - column
    band = (behind >= 0) & (behind < spec.span)  # [lane, tile, L, halo + L]

    def group(first: int, last: int, faults: Tensor) -> tuple[Tensor, Tensor, list[Weights]]:
        outputs, notes = [], list[Weights]()
        for n in range(first, last):
            cell = cells.number(n)
            found = gradients(spec.network, spec.bias, x.initial, cell.k, cell.v[..., :-1])
            finite = found.finite.all(1, keepdim=True)
            keep = finite & cell.present
            found = found.only(keep)
            k, u = torch.where(keep.unsqueeze(-1), cell.k, 0.0), -found.errors[0]
            columns = torch.where(keep, cell.v[..., -1], 0.0).unsqueeze(-2) * band[:, None, n]

            def linear(layer: int, h: Tensor) -> Tensor:
                z = h @ x.initial[layer]
                if layer > 0:
                    return z - (columns * (h @ found.inputs[layer].mT)) @ found.errors[layer]  # noqa: B023
                return z + spec.sum(h, x.theta, None, [], [Sum(k, u, columns)])  # noqa: B023

            outputs.append(spec.network.apply(linear, cell.q))
            faults = faults + (~finite[:, 0, halo:] & cell.present[:, 0, halo:]).sum(1)
            notes.append(surprise_and_update(found, torch.where(keep[..., halo:], cell.lr, 0.0), halo))
        return torch.stack(outputs, 2), faults, notes

    y, faults, notes = by_groups(group, count, x.state.faults)
    return y, (), (), None, faults, notes
