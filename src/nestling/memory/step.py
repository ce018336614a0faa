"""One token: a rank-one update and a read. No tiles, no masks built; the same work at every position."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory import directed
from nestling.memory.inputs import (
    Inputs,
    all_finite,
    border_guard,
    erase_strength,
    free,
    lanes_where,
    overflowed,
    refused,
    shift_tail,
    surely,
    unharmed,
)
from nestling.memory.networks.base import at
from nestling.memory.retentions import Scaled, linked, per_channel, settled, toward_initial
from nestling.memory.rules import Leader, Nesterov
from nestling.memory.state import MemoryState, Weights

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec


def write(
    inputs: Weights,
    errors: Weights,
    weights: Weights,
    momentum: Weights,
    size: Tensor,
    retention: Tensor | None,
    mu: Tensor | None,
    erase: Tensor | None,
    live: Tensor | None,
    halo: int,
    shares: Tensor | None = None,
    ahead: bool = False,
) -> tuple[Weights, Weights]:
    """Every layer's weights and momentum after one token.

    inputs, errors   factors x_l, δ_l `[lane, …, halo + 1, dim]` of the token and those before it in its window
    size             step of each factor `[lane, …, halo + 1, 1]`, 0 where masked;  gates `[lane, …, 1]`
    live             bool `[lane, 1]`: the token acts, which momentum must know;  None: in all lanes
    shares           of each channel `[lane, …, in]`, where what the channels keep is erased
    ahead            Nesterov's momentum
    """
    new_weights, new_momentum = [], []
    for layer, (w, h, delta) in enumerate(zip(weights, inputs, errors, strict=True)):
        right = size * delta
        own = h[..., halo:, :]
        seen = own if shares is None else own * shares.unsqueeze(-2)
        erased = (
            None if erase is None else erase_strength(erase, layer, own.square().sum(-1)).unsqueeze(-1) * (seen @ w)
        )
        if erased is not None and mu is None and halo == 0:
            right, erased = right + erased, None
        moved = h.mT @ right
        new = w if retention is None else retention.unsqueeze(-1) * w
        if mu is not None:
            s = mu.unsqueeze(-1) * momentum[layer] - moved
            added = mu.unsqueeze(-1) * s - moved if ahead else s
            if live is None:
                new = new + added
            else:
                keep = live.view(-1, *[1] * (w.dim() - 1))
                new, s = torch.where(keep, new + added, new), torch.where(keep, s, momentum[layer])
            new_momentum.append(s)
        else:
            new = new - moved
        new_weights.append(new if erased is None else new - own.mT @ erased)
    return tuple(new_weights), tuple(new_momentum)


def returning(weights: Weights, share: Tensor, start: Weights) -> Weights:
    """Weights that keep a share `[…, 1]` of what was, with the rest of the initial ones."""
    return tuple(w + (1 - share).unsqueeze(-1) * w0 for w, w0 in zip(weights, start, strict=True))


def step(spec: MemorySpec, x: Inputs) -> tuple[Tensor, MemoryState]:
    """A scan of length 1, lanes at any positions."""
    return unharmed(partial(_token, spec), x, partial(refused, t=0))


def _begun(x: Inputs, alive: Tensor | None) -> MemoryState:
    """What the token finds: the state, anew where a lane begins."""
    if x.reset is None:
        return x.state
    state, fresh = x.state, x.reset[:, 0] if alive is None else x.reset[:, 0] & alive
    return state._replace(
        anchor=lanes_where(fresh, x.start.weights, state.anchor),
        weights=lanes_where(fresh, x.start.weights, state.weights),
        momentum=lanes_where(fresh, x.start.momentum, state.momentum),
        tail=None if state.tail is None else state.tail.only(~fresh[:, None]),
        position=torch.where(fresh.cpu(), 0, state.position),
    )


def _gates(spec: MemorySpec, x: Inputs, live: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """η, α and β, neutral for tokens that are not live; live None: all are."""
    lr, retention, erase = x.lr, None if x.retention is None else x.retention.plain(), x.erase
    if retention is not None and per_channel(spec.retention):
        retention = retention[:, :, 0]  # each channel's share stands where a head's would
    if live is None:
        return lr, retention, erase
    return (
        torch.where(live, lr, 0.0),
        None if retention is None else torch.where(live, retention, 1.0),
        None if erase is None else torch.where(live, erase, 0.0),
    )


def _token(spec: MemorySpec, x: Inputs, gone: Tensor | None) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    from nestling.memory.tile import factors
    from nestling.memory.tiles import behind

    alive = None if x.valid is None else x.valid[:, 0]
    anchor, weights, momentum, tail, position, earlier = _begun(x, alive)
    keys, values, used = behind(tail, x.k, x.v, x.fine)
    halo = keys.shape[2] - 1

    standing = tuple(spec.retention.link(w) for w in anchor)
    found = factors(spec, standing, keys, values)
    live = x.fine if alive is None else x.fine & alive.to(x.fine.device)[:, None]
    masked = not surely(live)
    lr, retention, erase = _gates(spec, x, live[:, None] if masked else None)
    decays_first = per_channel(spec.retention) and spec.rule.erase == "after_decay"
    shares = retention if erase is not None and decays_first else None
    leads = isinstance(spec.rule, Leader)
    weight = torch.ones_like(lr) if spec.directed or leads else lr  # whose η stands outside the sum
    size = weight.unsqueeze(-1)
    if tail is not None:
        lags = torch.ones_like(keys[..., 0]) if x.window is None else x.window[:, :, 0].flip(-1)
        size = (weight * lags * used[:, None]).unsqueeze(-1)

    if alive is None:
        position = position + 1
        closing = position % spec.period == 0
        keep_tail = torch.ones_like(closing)
    else:
        keep_tail = alive.cpu()
        position = torch.where(keep_tail, position + 1, position)
        closing = keep_tail & (position % spec.period == 0)
    mu = x.momentum.plain() if spec.rule.momentum and x.momentum is not None else None
    acts = live if masked else None
    if spec.directed is not None:
        assert mu is not None
        due = spec.directed.due(position, closing)
        after, moved_s = directed.write(spec.directed, found, weights, momentum, size, lr, retention, mu, acts, due)
    else:
        after, moved_s = write(
            found.inputs,
            found.errors,
            weights,
            momentum,
            size,
            retention,
            mu,
            erase,
            acts,
            halo,
            shares,
            isinstance(spec.rule, Nesterov),
        )
    if leads:
        led = tuple(w + lr.unsqueeze(-1) * s for w, s in zip(x.start.weights, moved_s, strict=True))
        after = led if acts is None else lanes_where(live[:, 0], led, weights)

    if retention is not None and toward_initial(spec.retention):
        after = returning(after, retention, x.start.weights)

    begun = keep_tail & ((position - 1) % spec.period == 0) if spec.lagged else None
    after = settled(spec.retention, closing, after, anchor, begun, retention)
    if begun is not None:
        closing = closing | begun
    # A read after the write shows what is not finite by itself, without a pass over the weights.
    shows = gone is None and spec.read == "after" and spec.retention.linear and spec.directed is None
    shows = shows and free(lr) and not bool(closing.any())
    known = torch.zeros(len(lr), dtype=torch.bool) if shows else gone
    stood, (anchor, after, moved_s, broken) = anchor, border_guard(closing, anchor, after, moved_s, known)

    if spec.read == "boundary":
        y = spec.network.apply(at(standing), x.q)
    else:
        chosen = after if spec.read == "after" else weights
        stands = anchor if isinstance(spec.retention, Scaled) and spec.read == "after" else stood
        y = spec.network.apply(at([linked(spec.retention, w, a) for w, a in zip(chosen, stands, strict=True)]), x.q)
    if shows and not all_finite(y) and bool((harmed := overflowed(after, moved_s)).any()):
        return _token(spec, x, harmed)
    lost = ~(x.fine & found.finite[:, 0, halo:] | broken[:, None])
    if alive is not None:
        lost = lost & alive.to(lost.device)[:, None]
        y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    faults = earlier + lost.sum(1) + broken
    if tail is not None:
        tail = shift_tail(tail, x.k, x.v, x.fine, keep_tail)
    return y, MemoryState(anchor, after, moved_s, tail, position, faults), broken
