"""One token: a rank-one update and a read. No tiles, no masks built; the same work at every position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.inputs import Inputs, border_guard, erase_strength, lanes_where, shift_tail, surely
from nestling.memory.networks.base import at
from nestling.memory.state import MemoryState

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec


def step(spec: MemorySpec, x: Inputs) -> tuple[Tensor, MemoryState]:
    """A scan of length 1, lanes at any positions."""
    from nestling.memory.chunked import factors

    state, alive, tail = x.state, None, x.state.tail
    anchor, weights, momentum, position = state.anchor, state.weights, state.momentum, state.position
    if x.valid is not None:
        alive = x.valid[:, 0]
    if x.reset is not None:
        fresh = x.reset[:, 0] if alive is None else x.reset[:, 0] & alive
        anchor = lanes_where(fresh, x.start.weights, anchor)
        weights = lanes_where(fresh, x.start.weights, weights)
        momentum = lanes_where(fresh, x.start.momentum, momentum)
        position = torch.where(fresh.cpu(), 0, position)
        if tail is not None:
            tail = tail.only(~fresh[:, None])
    keys, values, used = x.k, x.v, x.fine
    if tail is not None:
        keys = torch.cat([tail.key, keys], 2)
        values = torch.cat([tail.value, values], 2)
        used = torch.cat([tail.ok, used], 1)
    halo = keys.shape[2] - 1

    linked = tuple(spec.retention.link(w) for w in anchor)
    found = factors(spec, linked, keys, values)
    lr = x.lr
    retention = None if x.retention is None else x.retention.plain()
    erase = x.erase
    live = x.fine if alive is None else x.fine & alive.to(x.fine.device)[:, None]
    masked = not surely(live)
    if masked:
        lr = torch.where(live[:, None], lr, 0.0)
        retention = None if retention is None else torch.where(live[:, None], retention, 1.0)
        erase = None if erase is None else torch.where(live[:, None], erase, 0.0)
    size = lr.unsqueeze(-1)
    if tail is not None:
        lags = torch.ones_like(keys[..., 0]) if x.window is None else x.window[:, :, 0].flip(-1)
        size = (lr * lags * used[:, None]).unsqueeze(-1)

    new_weights, new_momentum = [], []
    for layer, w in enumerate(weights):
        h, delta = found.inputs[layer], found.errors[layer]
        moved = h.mT @ (size * delta)
        new = w if retention is None else retention.unsqueeze(-1) * w
        if spec.rule.momentum:
            assert x.momentum is not None
            s = x.momentum.plain().unsqueeze(-1) * momentum[layer] - moved
            if masked:
                keep = live.view(-1, 1, 1, 1)
                new, s = torch.where(keep, new + s, new), torch.where(keep, s, momentum[layer])
            else:
                new = new + s
            new_momentum.append(s)
        else:
            new = new - moved
        if erase is not None:
            own = h[..., halo:, :]
            strength = erase_strength(erase, layer, own).unsqueeze(-1)
            new = new - own.mT @ (strength * (own @ w))
        new_weights.append(new)
    after, moved_s = tuple(new_weights), tuple(new_momentum)

    if spec.read == "boundary":
        y = spec.network.apply(at(linked), x.q)
    else:
        chosen = after if spec.read == "after" else weights
        y = spec.network.apply(at([spec.retention.link(w) for w in chosen]), x.q)
    lost = ~(x.fine & found.finite[:, 0, halo:])
    if alive is None:
        position = position + 1
        closing = position % spec.period == 0
        keep_tail = torch.ones_like(closing)
    else:
        here = alive.cpu()
        position = torch.where(here, position + 1, position)
        closing = here & (position % spec.period == 0)
        keep_tail = here
        lost = lost & alive.to(lost.device)[:, None]
        y = torch.where(alive.to(y.device).view(-1, 1, 1, 1), y, 0.0)
    faults = state.faults + lost.sum(1)
    if torch.compiler.is_compiling() or bool(closing.any()):
        anchor, after, moved_s, broken = border_guard(closing, anchor, after, moved_s)
        faults = faults + broken
    if tail is not None:
        tail = shift_tail(tail, x.k, x.v, x.fine, keep_tail)
    return y, MemoryState(anchor, after, moved_s, tail, position, faults)
