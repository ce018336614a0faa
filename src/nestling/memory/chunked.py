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

The pieces are public inside `memory/`: `factors`, `solve`, `read`, `advance`, with `coefficients` beside. Between lane and head
there may be one more dimension, of memories that share their gates (see `self_modifying`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestling.memory import channel, directed, fused, native, pieces
from nestling.memory.biases import Bias
from nestling.memory.coefficients import Coefficients, coefficients, each, leading
from nestling.memory.gates import Factor
from nestling.memory.inputs import Inputs, border_guard, erase_strength, lanes_where, surely
from nestling.memory.layout import Layout, layout
from nestling.memory.networks.base import Network, at
from nestling.memory.report import Report
from nestling.memory.retentions import Retention, Scaled, Settled, per_channel, settled, toward_initial
from nestling.memory.rules import Leader, Nesterov
from nestling.memory.state import MemoryState, Tail, Weights
from nestling.memory.step import returning, step

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec

T = TypeVar("T")
TILE = 64  # tokens per product
STALE_TILE = 128  # where nothing is read but the anchor
LINK_TILE = 16  # where each token's weights are made, or each channel's decays
MAPPED = 10  # numbers that a map of the momentum keeps for each of its entries
GROUP = 4  # tiles recomputed together in the backward pass, at least


class Factors(NamedTuple):
    """Rank-one gradients of a tile (halo first): x_l `[…, i, in_l]`, δ_l `[…, i, out_l]`, and which tokens were finite.

    products   x_l W_l at the anchor `[…, i, out_l]`
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    finite: Tensor
    products: tuple[Tensor, ...]

    def only(self, keep: Tensor) -> Factors:
        """Those of the tokens in `keep` (bool `[…, i]`), others 0."""
        return Factors(only(keep, self.inputs), only(keep, self.errors), keep, only(keep, self.products))


class Writes(NamedTuple):
    """What a tile writes, per layer: W_t = γ_t W_0 + f_t S_0 − Σ_i A[t,i] x_iᵀ δ_i − Σ_i D[t,i] x_iᵀ e_i.

    inputs   x_l `[…, halo + i, in_l]`
    errors   δ_l `[…, halo + i, out_l]`; None where `erased` holds r_l, which has them inside
    erased   e_l or r_l `[…, i, out_l]`; None where nothing is erased
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...] | None
    erased: tuple[Tensor, ...] | None
    halo: int


class Reader(Protocol):
    """What `read` asks of a memory."""

    @property
    def read(self) -> Literal["after", "before", "boundary"]: ...
    @property
    def network(self) -> Network: ...
    @property
    def retention(self) -> Retention: ...


class Triangle(NamedTuple):
    """Of an erasing layer: X Xᵀ `[…, i, halo + i]`, the strengths ε `[…, i]` and (I + T)⁻¹ `[…, i, i]`."""

    gram: Tensor
    strength: Tensor
    inverse: Tensor


def factors(spec: MemorySpec, anchor: Sequence[Tensor], k: Tensor, v: Tensor) -> Factors:
    """Gradients at the anchor (weights, not dual). A token whose factors are not finite gets factors of 0."""
    found = gradients(spec.network, spec.bias, anchor, k, v)
    keep = found.finite.all(1, keepdim=True)
    if keep.device.type == "cpu" and not torch.compiler.is_compiling() and bool((~keep).any()):
        # Made again without them: factors that overflow have derivatives that are no numbers, and 0 times these neither.
        k, v = (torch.where(keep.unsqueeze(-1), x, 0.0) for x in (k, v))
        found = gradients(spec.network, spec.bias, anchor, k, v)
    return found.only(keep)


def gradients(network: Network, bias: Bias, anchor: Sequence[Tensor], k: Tensor, v: Tensor) -> Factors:
    """Rank-one gradients at the anchor as they come, finite or not."""
    trace = network.trace(anchor, k)
    errors = network.errors(anchor, trace, bias.error(trace.prediction, v))
    return Factors(trace.inputs, errors, sound((*trace.inputs, *errors)), trace.products)


def sound(rows: Weights) -> Tensor:
    """Which rows `[…, i, dim]` are finite in all of these."""
    total = rows[0].detach().sum(-1)
    for x in rows[1:]:
        total = total + x.detach().sum(-1)
    return torch.isfinite(total)


def only(keep: Tensor, rows: Weights) -> Weights:
    """Rows `[…, i, dim]` in `keep` as they are, others 0."""
    if surely(keep):
        return rows
    return tuple(torch.where(keep.unsqueeze(-1), x, 0.0) for x in rows)


def triangle(c: Coefficients, layer: int, x_all: Tensor, erase: Tensor, halo: int) -> Triangle:
    """The system of an erasing layer, which depends on its inputs and the gates alone."""
    assert c.running is not None
    gram = x_all[..., halo:, :] @ x_all.mT
    strength = erase_strength(erase, layer, gram.diagonal(halo, -2, -1))
    t = c.running[..., :-1, :] * gram[..., halo:] * strength.unsqueeze(-1)
    return Triangle(gram, strength, invert(t))


def invert(t: Tensor) -> Tensor:
    """(I + T)⁻¹ of strictly lower triangular T."""
    unit = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    inverse: Tensor = torch.linalg.solve_triangular(unit + t, unit.expand_as(t), upper=False, unitriangular=True)
    return inverse


def solve(
    found: Factors,
    c: Coefficients,
    weights: Weights,
    momentum: Weights,
    erase: Tensor | None,
    halo: int,
    begins: bool,
    first: Triangle | None = None,
) -> Writes:
    """Add what an erasing rule takes away: e_i = ε_i x_i W_{i−1}, on the running weights.

    begins  a chunk begins here, so that the weights are the anchor and their products known
    first   the first layer's system, where several memories have the same keys and it is known already
    """
    inputs, errors, _, products = found
    if erase is None:
        return Writes(inputs, errors, None, halo)
    erased = []
    for layer, (x_all, delta) in enumerate(zip(inputs, errors, strict=True)):
        x, before = x_all[..., halo:, :], slice(None, -1)
        system = first if first is not None and layer == 0 else triangle(c, layer, x_all, erase, halo)
        gram, strength, inverse = system
        scale = strength if c.keep is None else strength * c.keep[..., before]
        product = products[layer][..., halo:, :] if begins else x @ weights[layer]
        right = scale.unsqueeze(-1) * product
        if c.step is not None:
            right = torch.addcmul(right, c.step.unsqueeze(-1), delta)
        else:
            assert c.write is not None
            if momentum:
                assert c.carry is not None
                right = _plus_scaled(right, strength * c.carry[..., before], x, momentum[layer])
            right = _plus(right, strength.unsqueeze(-1) * (c.write[..., before, :] * gram), delta, -1)
        erased.append(inverse @ right)
    return Writes(inputs, None if c.step is not None else errors, tuple(erased), halo)


def read(
    spec: Reader,
    c: Coefficients,
    anchor: Sequence[Tensor],
    weights: Weights,
    momentum: Weights,
    writes: Writes,
    q: Tensor,
    scales: Weights = (),
    start: Weights = (),
) -> Tensor:
    """Answer every query of the tile with its own token's weights.

    scales  what a scaled retention makes weights of the dual with, in this chunk
    start   initial weights, where what is not kept goes back to them
    """
    if spec.read == "boundary":
        return spec.network.apply(at(anchor), q)
    rows = slice(1, None) if spec.read == "after" else slice(None, -1)
    keep = None if c.keep is None else c.keep[..., rows]
    carry = None if c.carry is None else c.carry[..., rows]
    columns = _columns(c, writes)[..., rows, :]

    def linear(layer: int, h: Tensor) -> Tensor:
        s = momentum[layer] if momentum else None
        x, r = _rows(writes, layer)
        z = fused.read(h, weights[layer], keep, s, carry, x, columns, r)
        if start and keep is not None:
            z = z + (1 - keep).unsqueeze(-1) * (h @ start[layer])
        return scales[layer] * z if scales else z

    def through_link(layer: int, h: Tensor) -> Tensor:
        moved = torch.einsum("...ti,...ia,...ib->...tab", columns, *_rows(writes, layer))
        dual = weights[layer].unsqueeze(-3)
        if c.keep is not None:
            dual = c.keep[..., rows, None, None] * dual
        if momentum and c.carry is not None:
            dual = dual + c.carry[..., rows, None, None] * momentum[layer].unsqueeze(-3)
        return (h.unsqueeze(-2) @ spec.retention.link(dual - moved)).squeeze(-2)

    return spec.network.apply(linear if spec.retention.linear or scales else through_link, q)


def advance(c: Coefficients, weights: Weights, momentum: Weights, writes: Writes) -> tuple[Weights, Weights]:
    """Weights and momentum after the tile."""
    new_weights, new_momentum = [], []
    keep = None if c.keep is None else c.keep[..., -1]
    last = _columns(c, writes)[..., -1, :]
    for layer, w in enumerate(weights):
        s, carry = None, None
        if momentum:
            assert c.carry is not None
            assert c.write_s is not None
            assert writes.errors is not None
            s, carry = momentum[layer], c.carry[..., -1]
            step = writes.inputs[layer], c.write_s, writes.errors[layer]
            new_momentum.append(fused.advance(s, c.keep_s, None, None, *step))
        x, r = _rows(writes, layer)
        new_weights.append(fused.advance(w, keep, s, carry, x, last, r))
    return tuple(new_weights), tuple(new_momentum)


def _rows(writes: Writes, layer: int) -> tuple[Tensor, Tensor]:
    """x and r of a layer such that W_t = γ_t W_0 + f_t S_0 − Σ_i C[t,i] x_iᵀ r_i, both sums in one."""
    inputs, errors, erased, halo = writes
    x = inputs[layer]
    if erased is None:
        assert errors is not None
        return x, errors[layer]
    own = x[..., halo:, :]
    if errors is None:
        return own, erased[layer]
    return torch.cat([x, own], -2), torch.cat([errors[layer], erased[layer]], -2)


def _columns(c: Coefficients, writes: Writes) -> Tensor:
    """Its coefficients C `[…, L+1, i]`."""
    found = [
        m for m, rows in ((c.write, writes.errors), (c.running, writes.erased)) if m is not None and rows is not None
    ]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _plus_scaled(z: Tensor, scale: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """z + diag(scale) h w, scaling the narrower side."""
    if w.shape[-2] <= w.shape[-1]:
        return _plus(z, scale.unsqueeze(-1) * h, w)
    return torch.addcmul(z, scale.unsqueeze(-1), h @ w)


def _plus(z: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """z ± a b in one pass; a and b may lack z's dimension of memories."""
    lead = z.shape[:-2]

    def flat(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[-2:]).flatten(0, -3)

    return torch.baddbmm(flat(z), flat(a), flat(b), alpha=sign).view(z.shape)


class Tiles(NamedTuple):
    """Inputs of a call cut into tiles: `[lane, head, tile, …]`.

    alive, present: bool `[lane, 1, tile, …]`, as in `coefficients`;  None: all
    """

    q: Tensor
    k: Tensor
    v: Tensor
    erase: Tensor | None
    lr: Tensor
    retention: Factor | None
    momentum: Factor | None
    window: Tensor | None
    alive: Tensor | None
    present: Tensor | None

    def groups(self) -> list[Tiles]:
        """Groups of tiles. Taken apart at once, as the gradient of a slice is as large as the whole."""
        size = group_size(self.q.shape[2])
        count = -(-self.q.shape[2] // size)

        def split(x: Tensor | None) -> Sequence[Any]:
            return (None,) * count if x is None else torch.split(x, size, 2)

        def split_gate(x: Factor | None) -> Sequence[Any]:
            if x is None:
                return split(None)
            return [Factor(*parts) for parts in zip(split(x.log), split(x.zero), split(x.value), strict=True)]

        parts = (split_gate(x) if x is None or isinstance(x, Factor) else split(x) for x in self)
        return [Tiles(*part) for part in zip(*parts, strict=True)]


class Group(Protocol[T]):
    """Tiles first … last − 1: outputs, what goes on to the next group, and a note per tile."""

    def __call__(self, first: int, last: int, running: T, /) -> tuple[Tensor, T, list[Weights]]: ...


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
    if tile is not None and tile < 1:
        raise ValueError(f"tile is {tile}; expected at least 1 token")
    halo = spec.bias.window - 1
    per_token = _per_token(spec, x.retention is not None)
    size = tile or _tile_size(spec, per_token)
    cut = layout(x.state.position, time, x.reset, x.valid, period=spec.periods, tile=size, halo=halo)
    if cut.tokens.shape[1] == 0:  # no valid token at all
        return _silence(spec, x), x.state
    if report is None and (found := native.scan(spec, x, cut, scan)) is not None:
        tail = None if x.state.tail is None else carried(x.state.tail, x.k, x.v, x.fine, cut, x.mapped)
        return found.y, MemoryState(*found.stand, tail, cut.position, x.state.faults + _skipped(x))
    x = x.featured()
    groups, count = _tiles(spec, x, cut).groups(), cut.tokens.shape[1]
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


def group_size(count: int) -> int:
    """Of `count` tiles: what is kept between groups, and what a group keeps inside, then both grow with the root of the length.

    A tile keeps about twice as much inside as the weights that go from tile to tile.
    """
    return max(GROUP, isqrt(count // 2))


def by_groups(group: Group[T], count: int, running: T, *, again: bool = True) -> tuple[Tensor, T, list[Weights]]:
    """Run `count` tiles, a few at a time.

    again: in a backward pass a group is computed again instead of kept, so that memory does not grow with its insides.
    Returns outputs `[lane, head, tile, …]`, what goes on to the next call, and notes.
    """
    outputs, notes = [], list[Weights]()
    size = group_size(count)
    for first in range(0, count, size):
        last = min(first + size, count)
        if again and torch.is_grad_enabled() and count > size and not pieces.uncut():
            y, running, noted = checkpoint(
                group, first, last, running, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            y, running, noted = group(first, last, running)
        outputs.append(y)
        notes.extend(noted)
    return torch.cat(outputs, 2), running, notes


def series(notes: Sequence[Weights], cut: Layout, time: int) -> Weights:
    """Notes of tiles, each a tuple of `[lane, head, place]`, as series `[lane, head, time]`."""
    return tuple(back(torch.stack(parts, 2).unsqueeze(-1), cut, time).squeeze(-1) for parts in zip(*notes, strict=True))


def _tiles(spec: MemorySpec, x: Inputs, cut: Layout) -> Tiles:
    halo = spec.bias.window - 1
    keys, values, usable = x.k, x.v, x.fine
    if x.state.tail is not None:
        keys = torch.cat([x.state.tail.key, keys], 2)
        values = torch.cat([x.state.tail.value, values], 2)
        usable = torch.cat([x.state.tail.ok, usable], 1)
    own = _own(cut, halo)

    def pick(x: Tensor) -> Tensor:
        return gather(x, own, cut)

    lr = pick(x.lr)
    retention = None if x.retention is None else x.retention.map(pick)
    momentum = None if x.momentum is None else x.momentum.map(pick)
    erase = None if x.erase is None else pick(x.erase)
    window = None if x.window is None else pick(x.window)
    if spec.bias.window > 1 and window is None:
        window = lr.new_ones(*lr.shape, spec.bias.window)
    alive, present = None, None
    if cut.ok is not None or not surely(x.fine):
        present = gather(usable.unsqueeze(1), cut.tokens, cut)
        if cut.ok is not None:
            present = present & cut.ok.to(present.device).unsqueeze(1)
        alive = present[..., halo:]
        lr = torch.where(alive, lr, 0.0)
        erase = None if erase is None else torch.where(alive, erase, 0.0)
        if retention is not None:
            retention = retention.masked(alive.unsqueeze(-1) if per_channel(spec.retention) else alive)
        momentum = None if momentum is None else momentum.masked(alive)
    keys, values = gather(keys, cut.tokens, cut), gather(values, cut.tokens, cut)
    return Tiles(pick(x.q), keys, values, erase, lr, retention, momentum, window, alive, present)


def _own(cut: Layout, halo: int) -> Tensor:
    """Indices of the tiles' own tokens in the call (without the tail in front)."""
    return (cut.tokens[..., halo:] - halo).clamp_min(0)


def gather(x: Tensor, index: Tensor, cut: Layout) -> Tensor:
    """`[lane, head, stream, …]` → `[lane, head, tile, place, …]`."""
    if cut.ok is None:
        return x.reshape(*x.shape[:2], *index.shape[1:], *x.shape[3:])
    lanes = torch.arange(index.shape[0], device=x.device)[:, None]
    picked = x.transpose(1, 2)[lanes, index.to(x.device).flatten(1)]
    picked = picked.transpose(1, 2)
    return picked.reshape(*picked.shape[:2], *index.shape[1:], *picked.shape[3:])


def back(y: Tensor, cut: Layout, time: int) -> Tensor:
    """`[lane, head, tile, place, dim]` → `[lane, head, time, dim]`, zeros where no token was."""
    flat = y.flatten(2, 3)
    if cut.ok is None:
        return flat
    halo = cut.tokens.shape[-1] - cut.size
    own = torch.where(cut.ok[..., halo:], cut.tokens[..., halo:] - halo, time).flatten(1).to(y.device)
    out = flat.new_zeros(flat.shape[0], time + 1, flat.shape[1], flat.shape[3])
    lanes = torch.arange(own.shape[0], device=y.device)[:, None].expand_as(own)
    return out.index_put((lanes, own), flat.transpose(1, 2))[:, :time].transpose(1, 2)


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
        border = cut.border[first + n]
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
            weights = settled(spec.retention, border, weights, anchor)
            maps = bool(scales) or isinstance(spec.retention, Settled)
            if maps and spec.read == "after" and bool(border.any()):
                outputs[-1] = _closing(spec, cut, first + n, weights, queries[n], outputs[-1])
        if bool(border.any()):
            anchor, weights, momentum, broken = border_guard(border, anchor, weights, momentum)
            faults, linked = faults + broken, None
        lost = ~found.finite[:, 0, halo:]
        faults = faults + (lost if tiles.alive is None else lost & tiles.alive[:, 0, n]).sum(1)
        if noting:
            notes.append(surprise_and_update(found, tiles.lr[:, :, n], halo))
    return torch.stack(outputs, 2), Running(anchor, weights, momentum, faults), notes


def _closing(spec: MemorySpec, cut: Layout, number: int, weights: Weights, q: Tensor, y: Tensor) -> Tensor:
    """Answers of a tile, where a chunk's last token reads the weights of the new anchor."""
    place = torch.arange(cut.size, device=q.device)
    filled = cut.size if cut.ok is None else cut.ok[:, number, -cut.size :].sum(-1, keepdim=True).to(q.device)
    last = (place == filled - 1).expand(q.shape[0], -1) & cut.border[number].to(q.device)[:, None]
    its = torch.where(last[:, None, :, None], q, 0.0).sum(-2, keepdim=True)
    new = spec.network.apply(at([spec.retention.link(w) for w in weights]), its)
    return torch.where(last[:, None, :, None], new, y)


def surprise_and_update(found: Factors, lr: Tensor, halo: int) -> tuple[Tensor, Tensor]:
    """Surprise ‖∂ℓ/∂z_n‖ and size of the token's own step, η √Σ_l (‖x_l‖‖δ_l‖)²."""
    squares = [
        x[..., halo:, :].square().sum(-1) * d[..., halo:, :].square().sum(-1)
        for x, d in zip(found.inputs, found.errors, strict=True)
    ]
    return found.errors[-1][..., halo:, :].norm(dim=-1).detach(), (lr * sum(squares).sqrt()).detach()  # type: ignore[union-attr]


def carried(
    tail: Tail, k: Tensor, v: Tensor, fine: Tensor, cut: Layout, mapped: Callable[[Tensor], Tensor] | None = None
) -> Tail:
    """The tail after a call that read these tokens.  mapped: what makes keys what the tail has of them, if anything does."""
    lanes, halo = torch.arange(cut.tail.shape[0], device=k.device)[:, None], tail.ok.shape[1]
    index = cut.tail.to(k.device)
    old, new = index.clamp_max(halo - 1), (index - halo).clamp_min(0)
    read = index >= halo  # in this call

    def last(before: Tensor, here: Tensor) -> Tensor:
        return here if surely(read) else torch.where(read[:, None, :, None], here, pick(before, old))

    def pick(rows: Tensor, at: Tensor) -> Tensor:
        return rows.transpose(1, 2)[lanes, at].transpose(1, 2)

    keys = pick(k, new)
    keys = last(tail.key, keys if mapped is None else mapped(keys))
    there = torch.where(read, fine[lanes, new], tail.ok[lanes, old])
    return Tail(keys, last(tail.value, pick(v, new)), there).only(cut.tail_ok)
