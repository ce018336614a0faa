"""The self-modifying memory at speed: a loop over the engine's pieces, equal to its reference.

At the anchors a whole tile generates its keys, values, gates and targets at once; what follows is the chunk engine's linear
recurrence (Nested Learning, §8.2; derived). All memories share k_t, η_t and α_t: one set of coefficient matrices serves every
layer, and one triangular system the first layer of every memory. The generators have one shape and are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import native
from nestling.memory import step as one
from nestling.memory.chunked import TILE, Running
from nestling.memory.coefficients import coefficients
from nestling.memory.gates import Factor
from nestling.memory.inputs import lanes_where, surely, unharmed
from nestling.memory.layout import Layout, layout
from nestling.memory.networks.base import at
from nestling.memory.norm import l2_norm
from nestling.memory.report import Report
from nestling.memory.retentions import toward_initial
from nestling.memory.self_modifying import SelfModifying, Streams, close, refused
from nestling.memory.state import MemoryState, Weights
from nestling.memory.tile import Factors, advance, gradients, only, read, solve, sound, surprise_and_update, triangle
from nestling.memory.tiles import back, by_groups, gather, series


class Made(NamedTuple):
    """What the memories make of some tokens at the anchors, harmless where a token is not `live` (bool `[lane, time]`).

    q, k     `[lane, 1, head, time, dim]`: the dimension of memories is there already
    lr       η `[lane, 1, head, time]`, the rule's constant not included;  retention: α or None
    targets  v̂ of each bank `[lane, memory, head, time, dim]`
    """

    q: Tensor
    k: Tensor
    lr: Tensor
    retention: Factor | None
    targets: tuple[Tensor, ...]
    live: Tensor

    def erase(self, spec: SelfModifying) -> Tensor | None:
        """ε, or None."""
        if spec.rule.erase == "none":
            return None
        if spec.rule.erase == "after_decay" and self.retention is not None:
            return self.lr * self.retention.plain()
        return self.lr

    def pushes(self, spec: SelfModifying, momentum: Factor | None) -> Tensor:
        """What a gradient enters with, given the momentum of these tokens `[lane, 1, head, time]`."""
        lr = self.lr * spec.rule.step(spec.key_dim)
        return lr * momentum.complement() if spec.averages and momentum is not None else lr

    def keys(self, count: int) -> Tensor:
        """k of `count` memories, spread once: each product would copy it again."""
        return self.k.expand(-1, count, -1, -1, -1).contiguous()


def ask(spec: SelfModifying, x: Streams) -> Tensor:
    """What each generator is asked, `[lane, memory, head, time, dim]`."""
    given = {"k": x.k, "v": x.v, "lr": x.k, "retention": x.k, "q": x.q}
    return torch.stack([given[name] for name in spec.generators], 1)


def made_of(
    spec: SelfModifying, x: Streams, anchor: Weights, q: Tensor, asked: Tensor, fine: Tensor
) -> tuple[Made, tuple[Factors, ...]]:
    """Keys, gates and targets of tokens, and the factors of each bank, without those tokens of which something is not finite.

    q `[lane, head, time, dim]`, asked `[lane, memory, head, time, dim]`, fine bool `[lane, time]`
    """
    first = make(spec, x, anchor, q, asked, fine)
    made, factors = write(spec, anchor, first)
    lost = fine & ~made.live
    if lost.device.type == "cpu" and not torch.compiler.is_compiling() and bool(lost.any()):
        # Made again without them: what overflowed has derivatives that are no numbers, and 0 times these neither.
        acts = torch.stack([first.live if name == "q" else made.live for name in spec.generators], 1)
        asked = torch.where(acts[:, :, None, :, None], asked, 0.0)
        made, factors = write(spec, anchor, make(spec, x, anchor, q, asked, made.live, first.live))
    return made, factors


def make(
    spec: SelfModifying, x: Streams, anchor: Weights, q: Tensor, asked: Tensor, fine: Tensor, asks: Tensor | None = None
) -> Made:
    """Keys, gates and targets, as in `made_of`.  asks: tokens whose queries are answered; None: the `fine` ones."""
    generators = spec.banks[0]
    answers = generators.network.apply(at(anchor[generators.layers]), asked)
    answer = dict(zip(generators.names, torch.split(answers, 1, 1), strict=True))
    logits = {gate: (answer[gate] @ w + b).squeeze(-1) for gate, (w, b) in x.readout.items()}
    key, value, query = answer["k"], answer["v"], answer.get("q", q.unsqueeze(1))

    # The norm of a key that overflows is infinite, and its direction 0: finite, but not what was asked.
    whole = [
        key.square(),
        value.square() if spec.unit_values else value,
        *(logit.unsqueeze(-1) for logit in logits.values()),
    ]
    if spec.adaptive_q:
        whole.append(query.square())
        query = l2_norm(query)
    fine = fine & sound(tuple(whole)).all((1, 2))
    value = l2_norm(value) if spec.unit_values else value
    (query,) = only((fine if asks is None else asks)[:, None, None], (query,))
    key, value = only(fine[:, None, None], (l2_norm(key), value))

    targets = []
    for bank in spec.banks:
        given = value.expand(-1, len(bank.names), -1, -1, -1).contiguous()
        targets.append(bank.network.apply(at(anchor[bank.layers]), given))
    lr = spec.largest_steps[0] * logits["lr"].sigmoid()
    retention = Factor(F.logsigmoid(logits["retention"])) if "retention" in logits else None
    return _kept(Made(query, key, lr, retention, tuple(targets), fine), fine)


def _kept(made: Made, live: Tensor) -> Made:
    """With step sizes 0 and nothing forgotten at tokens that are not live."""
    if surely(live):
        return made
    acts = live[:, None, None]
    retention = None if made.retention is None else made.retention.masked(acts)
    return made._replace(lr=torch.where(acts, made.lr, 0.0), retention=retention, live=live)


def write(spec: SelfModifying, anchor: Weights, made: Made) -> tuple[Made, tuple[Factors, ...]]:
    """The factors of each bank, and what was made without the tokens whose factors are not finite."""
    drafts, live = [], made.live
    for bank, target in zip(spec.banks, made.targets, strict=True):
        draft = gradients(bank.network, spec.bias, anchor[bank.layers], made.keys(len(bank.names)), target)
        live = live & draft.finite.all((1, 2))
        drafts.append(draft)
    acts = live[:, None, None]
    return _kept(made, live), tuple(draft.only(acts) for draft in drafts)


def scan(
    spec: SelfModifying, x: Streams, *, tile: int | None = None, report: Report | None = None
) -> tuple[Tensor, MemoryState]:
    """Tile by tile."""
    time = x.q.shape[2]
    if time == 0:
        return x.q.new_zeros(x.q.shape), x.state
    if time == 1 and report is None:
        return step(spec, x)
    periods = tuple(bank.chunk for bank in spec.banks)
    cut = layout(x.state.position, time, x.reset, x.valid, period=periods, tile=tile or TILE, halo=0)
    if cut.tokens.shape[1] == 0:  # no valid token at all
        return x.q.new_zeros(x.q.shape), x.state
    if report is None and (found := native.scan_self_modifying(spec, x, cut, scan)) is not None:
        skipped = ~x.fine if x.valid is None else ~x.fine & x.valid
        return found.y, MemoryState(*found.stand, None, cut.position, x.state.faults + skipped.sum(1))
    tiles = _tiles(spec, x, cut)

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


class Tile(NamedTuple):
    """Inputs of one tile: q, k, v `[lane, head, place, dim]`, momentum `[lane, 1, head, place]`, bool `[lane, place]`: a token
    stands there, and it is fine."""

    q: Tensor
    asked: Tensor
    momentum: Factor | None
    use: Tensor
    fine: Tensor


def _tiles(spec: SelfModifying, x: Streams, cut: Layout) -> list[Tile]:
    """Taken apart at once, as the gradient of an index is as large as the whole."""
    count = cut.tokens.shape[1]

    def apart(u: Tensor) -> tuple[Tensor, ...]:
        return gather(u, cut.tokens, cut).unbind(2)

    use = torch.ones(cut.tokens.shape, dtype=torch.bool) if cut.ok is None else cut.ok
    uses = use.to(x.fine.device).unbind(1)
    fines = (fine.squeeze(1) for fine in apart(x.fine.unsqueeze(1)))
    momenta: Sequence[Factor | None] = [None] * count
    if x.momentum is not None:
        mu = x.momentum
        parts = (
            [None] * count if u is None else [n.unsqueeze(1) for n in apart(u)] for u in (mu.log, mu.zero, mu.value)
        )
        momenta = [Factor(log, zero, value) for log, zero, value in zip(*parts, strict=True) if log is not None]
    asked = (u.view(u.shape[0], -1, x.q.shape[1], *u.shape[2:]) for u in apart(ask(spec, x).flatten(1, 2)))
    return [
        Tile(q, a, mu, use, fine & use)
        for q, a, mu, use, fine in zip(apart(x.q), asked, momenta, uses, fines, strict=True)
    ]


def _group(
    spec: SelfModifying, x: Streams, running: Running, tiles: list[Tile], cut: Layout, numbers: range, noting: bool
) -> tuple[Tensor, Running, list[Weights]]:
    """A few tiles in order."""
    anchor, weights, momentum, faults = running
    outputs, notes = [], list[Weights]()
    back_to = x.start.weights if toward_initial(spec.retention) else ()
    for n in numbers:
        if cut.reset is not None:
            fresh = cut.reset[n]
            anchor = lanes_where(fresh, x.start.weights, anchor)
            weights = lanes_where(fresh, x.start.weights, weights)
            momentum = lanes_where(fresh, x.start.momentum, momentum)
        tile = tiles[n]
        made, factors = made_of(spec, x, anchor, tile.q, tile.asked, tile.fine)
        erase = made.erase(spec)
        mu, alive = tile.momentum, None
        if mu is not None and not surely(made.live):
            alive = made.live[:, None, None]
            mu = mu.masked(alive)
        c = coefficients(
            made.pushes(spec, tile.momentum),
            made.retention,
            mu,
            None,
            alive=alive,
            present=None,
            erases=erase is not None,
        )
        system = None if erase is None else triangle(c, 0, made.k, erase, 0)
        moved = []
        for bank, own_factors, begins in zip(spec.banks, factors, cut.begins[n], strict=True):
            own = bank.layers
            start = back_to[own]
            writes = solve(own_factors, c, weights[own], momentum[own], erase, 0, begins, system, start)
            if bank.names == ("main",):
                y = read(spec, c, anchor[own], weights[own], momentum[own], writes, made.q, start=start)
            after, moved_s = advance(c, weights[own], momentum[own], writes)
            if start and c.keep is not None:
                after = one.returning(after, c.keep[..., -1:], start)
            moved.append((after, moved_s))
        outputs.append(y.squeeze(1))
        weights, momentum = (sum(parts, ()) for parts in zip(*moved, strict=True))
        if bool(cut.borders[:, n].any()):
            closing = cut.borders[:, n].unbind()
            anchor, weights, momentum, broken = close(spec, closing, anchor, weights, momentum)
            faults = faults + broken
        faults = faults + (tile.use & ~made.live).sum(1)
        if noting:
            kept = torch.ones_like(made.lr) if made.retention is None else made.retention.plain()
            seen = (*surprise_and_update(factors[1], made.lr, 0), made.lr.detach(), kept.detach())
            notes.append(tuple(part.squeeze(1) for part in seen))
    return torch.stack(outputs, 2), Running(anchor, weights, momentum, faults), notes


def step(spec: SelfModifying, x: Streams) -> tuple[Tensor, MemoryState]:
    """A scan of length 1, lanes at any positions: rank-one updates, no tiles, the same work at every position."""
    return unharmed(partial(_token, spec), x, partial(refused, t=0))


def _token(spec: SelfModifying, x: Streams, gone: Tensor | None) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    anchor, weights, momentum, _, position, faults = x.state
    alive = None if x.valid is None else x.valid[:, 0]
    if x.reset is not None:
        fresh = x.reset[:, 0] if alive is None else x.reset[:, 0] & alive
        anchor = lanes_where(fresh, x.start.weights, anchor)
        weights = lanes_where(fresh, x.start.weights, weights)
        momentum = lanes_where(fresh, x.start.momentum, momentum)
        position = torch.where(fresh.cpu(), 0, position)
    fine = x.fine if alive is None else x.fine & alive.to(x.fine.device)[:, None]
    made, factors = made_of(spec, x, anchor, x.q, ask(spec, x), fine)
    gate = None if x.momentum is None else x.momentum.map(lambda u: u.unsqueeze(1))
    size = made.pushes(spec, gate).unsqueeze(-1)
    retention = None if made.retention is None else made.retention.plain()
    mu = None if gate is None else gate.plain()
    acts = None if surely(made.live) else made.live
    moved = [
        one.write(
            found.inputs,
            found.errors,
            weights[bank.layers],
            momentum[bank.layers],
            size,
            retention,
            mu,
            made.erase(spec),
            acts,
            0,
        )
        for bank, found in zip(spec.banks, factors, strict=True)
    ]
    after, moved_s = (sum(parts, ()) for parts in zip(*moved, strict=True))
    if retention is not None and toward_initial(spec.retention):
        after = one.returning(after, retention, x.start.weights)
    here = torch.ones_like(position, dtype=torch.bool) if alive is None else alive.cpu()
    position = torch.where(here, position + 1, position)
    closing = [here & (position % bank.chunk == 0) for bank in spec.banks]
    stood, (anchor, ends, moved_s, broken) = anchor, close(spec, closing, anchor, after, moved_s, gone)
    after = lanes_where(broken, stood, after)
    served = {"after": after, "before": weights, "boundary": stood}[spec.read]
    y = spec.network.apply(at(served[spec.banks[1].layers]), made.q).squeeze(1)
    lost = ~(made.live | broken[:, None])
    if alive is not None:
        lost = lost & alive.to(lost.device)[:, None]
        y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    return y, MemoryState(anchor, ends, moved_s, None, position, faults + lost.sum(1) + broken), broken
