"""The self-modifying memory at speed: a loop over the engine's pieces, equal to its reference.

At the anchors a whole tile generates its keys, values, gates and targets at once; what follows is the chunk engine's linear
recurrence (Nested Learning, §8.2; derived). All memories share k_t, η_t and α_t: one set of coefficient matrices serves every
layer, and one triangular system the first layer of every memory. The generators have one shape and are computed together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import step as one
from nestling.memory.chunked import (
    TILE,
    Factors,
    Running,
    advance,
    back,
    by_groups,
    gather,
    gradients,
    only,
    read,
    series,
    solve,
    sound,
    surprise_and_update,
    triangle,
)
from nestling.memory.coefficients import coefficients
from nestling.memory.gates import Factor
from nestling.memory.inputs import lanes_where, surely
from nestling.memory.layout import Layout, layout
from nestling.memory.networks.base import at
from nestling.memory.norm import l2_norm
from nestling.memory.report import Report
from nestling.memory.self_modifying import SelfModifying, Streams, close
from nestling.memory.state import MemoryState, Weights


class Made(NamedTuple):
    """What the memories make of some tokens at the anchors, harmless where a token is not `live` (bool `[lane, time]`).

    q, k    `[lane, 1, head, time, dim]`: the dimension of memories is there already
    lr      η `[lane, 1, head, time]`, the rule's constant not included;  erase: ε or None;  retention: α or None
    found   factors of each bank
    """

    q: Tensor
    k: Tensor
    lr: Tensor
    erase: Tensor | None
    retention: Factor | None
    found: tuple[Factors, ...]
    live: Tensor


def make(spec: SelfModifying, x: Streams, anchor: Weights, q: Tensor, k: Tensor, v: Tensor, fine: Tensor) -> Made:
    """Keys, values, gates, targets and factors of tokens; q, k, v `[lane, head, time, dim]`, fine bool `[lane, time]`."""
    generators = spec.banks[0]
    given = {"k": k, "v": v, "lr": k, "retention": k, "q": q}
    asked = torch.stack([given[name] for name in generators.names], 1)
    answers = generators.network.apply(at(anchor[generators.layers]), asked)
    answer = {name: answers[:, n : n + 1] for n, name in enumerate(generators.names)}
    logits = {gate: (answer[gate] @ w + b).squeeze(-1) for gate, (w, b) in x.readout.items()}
    key, value, query = answer["k"], answer["v"], answer.get("q", q.unsqueeze(1))

    # The norm of a key that overflows is infinite, and its direction 0: finite, but not what was asked.
    whole = [key.square(), value.square() if spec.unit_values else value, *(logit.unsqueeze(-1) for logit in logits.values())]
    if spec.adaptive_q:
        whole.append(query.square())
        query = l2_norm(query)
    fine = fine & sound(tuple(whole)).all((1, 2))
    value = l2_norm(value) if spec.unit_values else value
    query, key, value = only(fine[:, None, None], (query, l2_norm(key), value))

    pairs = []
    for bank in spec.banks:
        own = anchor[bank.layers]
        target = bank.network.apply(at(own), value)
        pairs.append(gradients(bank.network, spec.bias, own, key, target))
    live = fine
    for rows in (rows for pair in pairs for rows in pair):
        live = live & sound(rows).all((1, 2))
    acts = live[:, None, None]
    found = tuple(Factors(only(acts, inputs), only(acts, errors), acts) for inputs, errors in pairs)

    lr = spec.lr_max * logits["lr"].sigmoid()
    retention = Factor(F.logsigmoid(logits["retention"])) if "retention" in logits else None
    if not surely(live):
        lr = torch.where(acts, lr, 0.0)
        retention = None if retention is None else retention.masked(acts)
    erase = None if spec.rule.erase == "none" else lr
    if spec.rule.erase == "after_decay" and retention is not None:
        erase = lr * retention.plain()
    return Made(query, key, lr, erase, retention, found, live)


def scan(
    spec: SelfModifying, x: Streams, *, tile: int | None = None, report: Report | None = None
) -> tuple[Tensor, MemoryState]:
    """Tile by tile."""
    time = x.q.shape[2]
    if time == 0:
        return x.q.new_zeros(x.q.shape), x.state
    if time == 1 and report is None:
        return step(spec, x)
    if tile is not None and tile < 1:
        raise ValueError(f"tile is {tile}; expected at least 1 token")
    periods = tuple(bank.chunk for bank in spec.banks)
    cut = layout(x.state.position, time, x.reset, x.valid, period=periods, tile=tile or TILE, halo=0)
    if cut.tokens.shape[1] == 0:  # no valid token at all
        return x.q.new_zeros(x.q.shape), x.state
    tiles = _tiles(x, cut)

    def group(first: int, last: int, running: Running) -> tuple[Tensor, Running, list[Weights]]:
        return _group(spec, x, running, tiles, cut, range(first, last), report is not None)

    running = Running(x.state.anchor, x.state.weights, x.state.momentum, x.state.faults)
    y, running, notes = by_groups(group, cut.tokens.shape[1], running)
    if report is not None:
        surprise, update, lr, retention = series(notes, cut, time)
        report.add(surprise=surprise, update=update, lr=lr, retention=retention)
        if x.momentum is not None:
            report.add(momentum=x.momentum.plain())
        report.count(faults=running.faults - x.state.faults)
    return back(y, cut, time), MemoryState(
        running.anchor, running.weights, running.momentum, None, cut.position, running.faults
    )


class Tiles(NamedTuple):
    """Inputs of a call cut into tiles: `[lane, head, tile, …]`; use, fine: bool `[lane, tile, place]`, use None: all."""

    q: Tensor
    k: Tensor
    v: Tensor
    momentum: Factor | None
    use: Tensor | None
    fine: Tensor


def _tiles(x: Streams, cut: Layout) -> Tiles:
    def pick(u: Tensor) -> Tensor:
        return gather(u, cut.tokens, cut)

    fine, use = pick(x.fine.unsqueeze(1)).squeeze(1), None
    if cut.ok is not None:
        use = cut.ok.to(fine.device)
        fine = fine & use
    momentum = None if x.momentum is None else x.momentum.map(pick)
    return Tiles(pick(x.q), pick(x.k), pick(x.v), momentum, use, fine)


def _of_tile(gate: Factor, n: int) -> Factor:
    """One tile's part of a gate, with the dimension of memories."""
    return gate.map(lambda x: x[:, None, :, n])


def _group(
    spec: SelfModifying, x: Streams, running: Running, tiles: Tiles, cut: Layout, numbers: range, noting: bool
) -> tuple[Tensor, Running, list[Weights]]:
    """A few tiles in order."""
    anchor, weights, momentum, faults = running
    outputs, notes = [], list[Weights]()
    for n in numbers:
        if cut.reset is not None:
            fresh = cut.reset[n]
            anchor = lanes_where(fresh, x.start.weights, anchor)
            weights = lanes_where(fresh, x.start.weights, weights)
            momentum = lanes_where(fresh, x.start.momentum, momentum)
        made = make(spec, x, anchor, tiles.q[:, :, n], tiles.k[:, :, n], tiles.v[:, :, n], tiles.fine[:, n])
        mu, alive = None, None
        if tiles.momentum is not None:
            mu = _of_tile(tiles.momentum, n)
            if not surely(made.live):
                alive = made.live[:, None, None]
                mu = mu.masked(alive)
        c = coefficients(
            made.lr * spec.rule.step(spec.key_dim),
            made.retention,
            mu,
            None,
            alive=alive,
            present=None,
            erases=made.erase is not None,
        )
        system = None if made.erase is None else triangle(c, made.k, made.erase, 0)
        moved = []
        for bank, found in zip(spec.banks, made.found, strict=True):
            own = bank.layers
            writes = solve(found, c, weights[own], momentum[own], made.erase, 0, system)
            if bank.names == ("main",):
                y = read(spec, c, anchor[own], weights[own], momentum[own], writes, made.q)
            moved.append(advance(c, weights[own], momentum[own], writes))
        outputs.append(y.squeeze(1))
        weights, momentum = (sum(parts, ()) for parts in zip(*moved, strict=True))
        anchor, weights, momentum, faults = close(spec, cut.borders[:, n].unbind(), anchor, weights, momentum, faults)
        lost = ~made.live if tiles.use is None else tiles.use[:, n] & ~made.live
        faults = faults + lost.sum(1)
        if noting:
            kept = torch.ones_like(made.lr) if made.retention is None else made.retention.plain()
            seen = (*surprise_and_update(made.found[1], made.lr, 0), made.lr.detach(), kept.detach())
            notes.append(tuple(part.squeeze(1) for part in seen))
    return torch.stack(outputs, 2), Running(anchor, weights, momentum, faults), notes


def step(spec: SelfModifying, x: Streams) -> tuple[Tensor, MemoryState]:
    """A scan of length 1, lanes at any positions: rank-one updates, no tiles, the same work at every position."""
    anchor, weights, momentum, _, position, faults = x.state
    alive = None if x.valid is None else x.valid[:, 0]
    if x.reset is not None:
        fresh = x.reset[:, 0] if alive is None else x.reset[:, 0] & alive
        anchor = lanes_where(fresh, x.start.weights, anchor)
        weights = lanes_where(fresh, x.start.weights, weights)
        momentum = lanes_where(fresh, x.start.momentum, momentum)
        position = torch.where(fresh.cpu(), 0, position)
    fine = x.fine if alive is None else x.fine & alive.to(x.fine.device)[:, None]
    made = make(spec, x, anchor, x.q, x.k, x.v, fine)
    size = (made.lr * spec.rule.step(spec.key_dim)).unsqueeze(-1)
    retention = None if made.retention is None else made.retention.plain()
    mu = None if x.momentum is None else x.momentum.plain().unsqueeze(1)
    acts = None if surely(made.live) else made.live
    moved = [
        one.write(*found[:2], weights[bank.layers], momentum[bank.layers], size, retention, mu, made.erase, acts, 0)
        for bank, found in zip(spec.banks, made.found, strict=True)
    ]
    after, moved_s = (sum(parts, ()) for parts in zip(*moved, strict=True))
    served = {"after": after, "before": weights, "boundary": anchor}[spec.read]
    y = spec.network.apply(at(served[spec.banks[1].layers]), made.q).squeeze(1)
    lost = ~made.live
    if alive is None:
        position = position + 1
        here = torch.ones_like(position, dtype=torch.bool)
    else:
        here = alive.cpu()
        position = torch.where(here, position + 1, position)
        lost = lost & alive.to(lost.device)[:, None]
        y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    faults = faults + lost.sum(1)
    closing = [here & (position % bank.chunk == 0) for bank in spec.banks]
    anchor, after, moved_s, faults = close(spec, closing, anchor, after, moved_s, faults)
    return y, MemoryState(anchor, after, moved_s, None, position, faults)
