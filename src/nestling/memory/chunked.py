"""The engine: a whole tile of tokens in a handful of matrix products, equal to the reference.

Gradients of a tile are rank-one factors (x_i, δ_i) at the anchor. No weight matrix per token is ever made; a token's read is

    h_t W_t = γ_t h_t W_0 + f_t h_t S_0 − Σ_i A[t,i] (h_t·x_i) δ_i − Σ_i D[t,i] ε_i (h_t·x_i) p_i

layer after layer with the query's own activations (Titans, §3.2; derived). An erasing rule needs p_i = x_i W_{i−1}, which is
one unit-lower-triangular system for the rows e_i = ε_i p_i,

    (I + T) E = diag(ε) (diag(γ_{t−1}) X W_0 + diag(f_{t−1}) X S_0 − (A_{t−1} ∘ X Xᵀ) Δ)        T[t,i] = ε_t D[t−1,i] (x_t·x_i)

(Nested Learning, §8.2; derived). Without momentum and window A = D diag(η), and both sums merge: with r_i = η_i δ_i + e_i,

    (I + T) R = diag(η) Δ + diag(ε γ_{t−1}) X W_0        W_t = γ_t W_0 − Σ_i D[t,i] x_iᵀ r_i

A retention with a link keeps its weights in the dual; there each token's weights are made, as no rank-one form exists, unless
the link is a number that stands for the chunk, which goes to the read.

What is done with one tile is in `tile`, with `coefficients` beside; how a call is cut into tiles and groups of them in `tiles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nestling.memory import channel, directed, native, pieces
from nestling.memory.coefficients import Coefficients, coefficients, each, leading
from nestling.memory.inputs import Inputs, border_guard, lanes_where
from nestling.memory.layout import Layout, layout
from nestling.memory.networks.base import at
from nestling.memory.report import Report
from nestling.memory.retentions import Scaled, Settled, per_channel, settled, toward_initial
from nestling.memory.rules import Leader, Nesterov
from nestling.memory.state import MemoryState, Weights
from nestling.memory.step import returning, step
from nestling.memory.tile import advance, factors, read, solve, surprise_and_update
from nestling.memory.tiles import Tiles, back, by_groups, carried, group_size, series, tiles

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

TILE = 64  # tokens per product
STALE_TILE = 128  # where nothing is read but the anchor
LINK_TILE = 16  # where each token's weights are made, or each channel's decays
MAPPED = 10  # numbers that a map of the momentum keeps for each of its entries


class Running(NamedTuple):
    """What goes from tile to tile."""

    anchor: Weights
    weights: Weights
    momentum: Weights
    faults: Tensor


def scan(
    spec: MemorySpec, x: Inputs, *, tile: int | None = None, report: Report | None = None
) -> tuple[Tensor, MemoryState]:
    """Tile by tile; see the module."""
    time = x.q.shape[2]
    if time == 0:
        return _silence(spec, x), x.state
    if time == 1 and report is None:
        return step(spec, x.featured())
    halo = spec.bias.window - 1
    per_token = _per_token(spec, x.retention is not None)
    size = tile or _tile_size(spec, per_token)
    cut = layout(
        x.state.position, time, x.reset, x.valid, period=spec.periods, tile=size, halo=halo, shifts=spec.shifts
    )
    if cut.tokens.shape[1] == 0:  # no valid token at all
        return _silence(spec, x), x.state
    if report is None and (found := native.scan(spec, x, cut, scan)) is not None:
        tail = None if x.state.tail is None else carried(x.state.tail, x.k, x.v, x.fine, cut, x.mapped)
        return found.y, MemoryState(*found.stand, tail, cut.position, x.state.faults + _skipped(x))
    x = x.featured()
    groups, count = tiles(spec, x, cut).groups(), cut.tokens.shape[1]
    running = Running(x.state.anchor, x.state.weights, x.state.momentum, x.state.faults)

    def group(first: int, last: int, running: Running) -> tuple[Tensor, Running, list[Weights]]:
        return _group(spec, x.start, running, groups[first // group_size(count)], cut, first, report is not None)

    # What is inside a linear memory that erases nothing is no larger than its inputs: cheaper to keep than to make again.
    keep = spec.network.depth == 1 and not per_token and spec.rule.erase == "none"
    y, running, notes = by_groups(group, count, running, again=not keep)
    y = back(y, cut, time)
    faults = running.faults + _skipped(x)
    if report is not None:
        surprise, update = series(notes, cut, time)
        report.add(surprise=surprise, update=update, lr=x.lr)
        if x.retention is not None:
            kept = x.retention.plain()
            report.add(retention=kept.mean(-1) if kept.dim() > 3 else kept)  # of channels: what they keep on average
        if x.momentum is not None:
            report.add(momentum=x.momentum.plain())
        report.count(faults=faults - x.state.faults)
    tail = None if x.state.tail is None else carried(x.state.tail, x.k, x.v, x.fine, cut)
    return y, MemoryState(running.anchor, running.weights, running.momentum, tail, cut.position, faults)


def _per_token(spec: MemorySpec, decays: bool) -> bool:
    """Whether weights of every token are made, or decays of every channel."""
    through_link = not spec.retention.linear and not isinstance(spec.retention, Scaled)
    directed = spec.directed is not None and spec.directed.per_token
    return through_link or directed or (per_channel(spec.retention) and decays)


def _tile_size(spec: MemorySpec, per_token: bool) -> int:
    return LINK_TILE if per_token else STALE_TILE if spec.read == "boundary" else TILE


def piece(spec: MemorySpec, shape: tuple[int, int, int], tile: int | None, like: Tensor) -> pieces.Size | None:
    """How a call `[lane, head, time]` is cut; None where it is not: the C code makes again by itself what it needs.

    like   a tensor of the call's device in the compute dtype
    """
    cell = native.Cell.of(spec, spec.network)
    if native.makes(cell, spec.features) and native.serves(cell, like):
        return None
    per_token = _per_token(spec, True)
    numbers, rows = sum(i * o for i, o in spec.fast_shapes), sum(i + o for i, o in spec.fast_shapes)
    state = numbers * (2 if spec.rule.momentum else 1)
    unit = min(tile or _tile_size(spec, per_token), *spec.periods)
    inside = state + pieces.INSIDE * unit * (rows + unit) + (unit * numbers if per_token else 0)
    memories = -(-pieces.FEW // numbers)
    if spec.directed is not None:
        inside, memories = inside + MAPPED * numbers * (unit if per_token else 1), 1
    return pieces.fitting(shape, like, unit=unit, state=state, inside=inside, memories=memories)


def _skipped(x: Inputs) -> Tensor:
    """How many tokens of each lane the token guard left out."""
    return (~x.fine if x.valid is None else ~x.fine & x.valid).sum(1)


def _silence(spec: MemorySpec, x: Inputs) -> Tensor:
    """Answers to no tokens at all."""
    return x.v.new_zeros(*x.v.shape[:3], spec.value_dim)


def _group(
    spec: MemorySpec,
    start: MemoryState,
    running: Running,
    tiles: Tiles,
    cut: Layout,
    first: int,
    noting: bool,
) -> tuple[Tensor, Running, list[Weights]]:
    """A few tiles in order."""
    anchor, weights, momentum, faults = running
    halo = spec.bias.window - 1
    outputs, notes = [], list[Weights]()
    linked: tuple[Tensor, ...] | None = None
    scales: Weights = ()
    back_to = start.weights if toward_initial(spec.retention) or isinstance(spec.rule, Leader) else ()
    queries, keys, values = tiles.q.unbind(2), tiles.k.unbind(2), tiles.v.unbind(2)
    erases = each(tiles.erase, len(queries))
    matrices: list[Coefficients] = []
    courses: list[directed.Course] = []
    channels: list[channel.Course] = []
    if spec.directed is not None:
        courses = directed.courses(spec.directed, tiles, cut, first)
    elif per_channel(spec.retention) and tiles.retention is not None:
        channels = channel.courses(tiles)
    elif isinstance(spec.rule, Leader):
        assert tiles.momentum is not None
        gates = tiles.lr, tiles.momentum, tiles.window
        matrices = leading(*gates, alive=tiles.alive, present=tiles.present).each()
    else:
        matrices = coefficients(
            tiles.lr,
            tiles.retention,
            tiles.momentum,
            tiles.window,
            alive=tiles.alive,
            present=tiles.present,
            erases=tiles.erase is not None,
            ahead=isinstance(spec.rule, Nesterov),
        ).each()
    for n in range(len(queries)):
        if cut.reset is not None:
            fresh = cut.reset[first + n]
            anchor = lanes_where(fresh, start.weights, anchor)
            weights = lanes_where(fresh, start.weights, weights)
            momentum = lanes_where(fresh, start.momentum, momentum)
            linked = None
        if linked is None:
            linked = tuple(spec.retention.link(w) for w in anchor)
            if isinstance(spec.retention, Scaled):
                scales = tuple(spec.retention.scale(w) for w in anchor)
        found = factors(spec, linked, keys[n], values[n])
        border = closing = cut.border[first + n]
        begun = cut.borders[-1, first + n] if spec.lagged else None  # a chunk's first token is a tile
        if begun is not None:
            border = closing | begun
        if courses:
            acts = cut.borders[-1, first + n]
            y, weights, momentum = directed.tile(spec, courses[n], linked, weights, momentum, found, queries[n], acts)
            outputs.append(y)
        elif channels:
            y, weights, momentum = channel.tile(
                spec, channels[n], linked, weights, momentum, found, queries[n], erases[n]
            )
            outputs.append(y)
        else:
            c = matrices[n]
            writes = solve(found, c, weights, momentum, erases[n], halo, cut.begins[first + n][0])
            outputs.append(read(spec, c, linked, weights, momentum, writes, queries[n], scales, back_to))
            weights, momentum = advance(c, weights, momentum, writes)
            if back_to and c.keep is not None:
                weights = returning(weights, c.keep[..., -1:], back_to)
            share = None if c.keep is None else c.keep[..., -1:]
            weights = settled(spec.retention, closing, weights, anchor, begun, share)
            maps = bool(scales) or isinstance(spec.retention, Settled)
            if maps and spec.read == "after" and bool(border.any()):
                outputs[-1] = _closing(spec, cut, first + n, border, weights, queries[n], outputs[-1])
        if bool(border.any()):
            anchor, weights, momentum, broken = border_guard(border, anchor, weights, momentum)
            faults, linked = faults + broken, None
        lost = ~found.finite[:, 0, halo:]
        faults = faults + (lost if tiles.alive is None else lost & tiles.alive[:, 0, n]).sum(1)
        if noting:
            notes.append(surprise_and_update(found, tiles.lr[:, :, n], halo))
    return torch.stack(outputs, 2), Running(anchor, weights, momentum, faults), notes


def _closing(
    spec: MemorySpec, cut: Layout, number: int, border: Tensor, weights: Weights, q: Tensor, y: Tensor
) -> Tensor:
    """Answers of a tile, where the last token before a new anchor (`border`, bool `[lane]`) reads that anchor's weights."""
    place = torch.arange(cut.size, device=q.device)
    filled = cut.size if cut.ok is None else cut.ok[:, number, -cut.size :].sum(-1, keepdim=True).to(q.device)
    last = (place == filled - 1).expand(q.shape[0], -1) & border.to(q.device)[:, None]
    its = torch.where(last[:, None, :, None], q, 0.0).sum(-2, keepdim=True)
    new = spec.network.apply(at([spec.retention.link(w) for w in weights]), its)
    return torch.where(last[:, None, :, None], new, y)
