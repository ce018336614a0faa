"""The definition: one token after the other, the inner gradient by autograd on the written loss. Slow on purpose.

G_t = Σ_i γ_i ∇_W ℓ(M(k_i; link(A)), v_i)        A: the anchor, weights at the start of token t's chunk
S_t = μ_t S_{t−1} − η_t G_t
Z_t = α_t Z_{t−1} − ε_t x_tᵀ(x_t Z_{t−1}) + S_t  x_t: each layer's own input at the anchor
A directed rule has S_t = μ_t S_{t−1} − G_t and adds η_t D(S_t) in place of S_t, at every token, every r-th or a chunk's last.
Nesterov adds μ_t S_t − η_t G_t in place of S_t. A leader has S_t = μ_t S_{t−1} − G_t and W_t = W_0 + η_t S_t.
A retention may map what a chunk's last token leaves, and its first (see `Settled` and `Lagged`).
y_t = M(q_t; link(Z_t))                          or link(Z_{t−1}), or link(A): spec.read
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory.inputs import (
    Inputs,
    border_guard,
    erase_strength,
    lanes_where,
    refused,
    shift_tail,
    surely,
    unharmed,
)
from nestling.memory.networks.base import Network, at
from nestling.memory.retentions import linked, per_channel, settled, toward_initial
from nestling.memory.rules import Leader, Nesterov
from nestling.memory.rules.delta import erasure
from nestling.memory.state import MemoryState, Weights

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec


def scan(spec: MemorySpec, inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Token by token. Works under `no_grad`; refuses `inference_mode`, where autograd cannot run."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("engine='reference' differentiates by autograd: call it outside torch.inference_mode()")
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = inputs.featured()
        state, outputs = inputs.state, []
        for t in range(inputs.q.shape[2]):
            y, state = unharmed(partial(_token, spec, state, t), inputs, partial(refused, t=t))
            outputs.append(y)
        if not outputs:
            return inputs.q.new_zeros(*inputs.q.shape[:3], spec.value_dim), state
        y = torch.stack(outputs, 2)
    if outer:
        return y, state
    return y.detach(), detach(state)


def _token(
    spec: MemorySpec, state: MemoryState, t: int, x: Inputs, gone: Tensor | None
) -> tuple[Tensor, MemoryState, Tensor]:
    """See `unharmed`."""
    lanes = x.q.shape[0]
    alive = torch.ones(lanes, dtype=torch.bool) if x.valid is None else x.valid[:, t].cpu()
    if x.reset is not None:
        fresh = x.reset[:, t].cpu() & alive
        tail = state.tail
        if tail is not None:
            tail = tail.only(~fresh[:, None])
        state = state._replace(
            anchor=lanes_where(fresh, x.start.weights, state.anchor),
            weights=lanes_where(fresh, x.start.weights, state.weights),
            momentum=lanes_where(fresh, x.start.momentum, state.momentum),
            tail=tail,
            position=torch.where(fresh, 0, state.position),
        )
    fine = x.fine[:, t]
    keys, values, used = x.k[:, :, t, None], x.v[:, :, t, None], fine[:, None]
    if state.tail is not None:
        keys = torch.cat([state.tail.key, keys], 2)
        values = torch.cat([state.tail.value, values], 2)
        used = torch.cat([state.tail.ok, used], 1)

    anchor = tuple(spec.retention.link(w) for w in state.anchor)
    gradients, finite = _gradients(spec, x, anchor, keys, values, used, t)
    layers = layer_inputs(spec.network, anchor, x.k[:, :, t, None])

    position = torch.where(alive, state.position + 1, state.position)
    closing = alive & (position % spec.period == 0)
    live = (fine & alive.to(fine.device)).view(-1, 1, 1, 1)
    before, after, momentum = state.weights, [], []
    for layer, (w, g) in enumerate(zip(before, gradients, strict=True)):
        lr = x.lr[:, :, t, None, None]
        leads = isinstance(spec.rule, Leader)
        step = -g if spec.directed or leads else -lr * g
        if spec.rule.momentum:
            assert x.momentum is not None
            mu = x.momentum.plain()[:, :, t, None, None]
            s = mu * state.momentum[layer] + step
            momentum.append(torch.where(live, s, state.momentum[layer]))
            step = mu * s + step if isinstance(spec.rule, Nesterov) else s
        if (rule := spec.directed) is not None:
            acts = rule.due(position, closing)
            step = torch.where(acts.to(step.device).view(-1, 1, 1, 1), lr * rule.direction(step), 0.0)
        share = None
        if x.retention is not None:
            share = (
                x.retention.plain()[:, :, t, None].mT
                if per_channel(spec.retention)
                else x.retention.plain()[:, :, t, None, None]
            )
        new = w if share is None else share * w
        if leads:
            new, step = x.start.weights[layer], lr * step
        if share is not None and toward_initial(spec.retention):
            new = new + (1 - share) * x.start.weights[layer]
        if x.erase is not None:
            h = layers[layer]
            strength = erase_strength(x.erase[:, :, t], layer, h.square().sum(-1)) * finite[:, None]
            seen = new if per_channel(spec.retention) and spec.rule.erase == "after_decay" else w
            x_t = h[..., None, :]
            new = new - erasure(x_t, x_t @ seen, strength[..., None, None])
        after.append(torch.where(live, new + step, w))

    if spec.lagged:
        begun = alive & ((position - 1) % spec.period == 0)
        kept = None if x.retention is None else torch.where(live[..., 0], x.retention.plain()[:, :, t, None], 1.0)
        ends = settled(spec.retention, closing, tuple(after), state.anchor, begun, kept)
        closing = closing | begun
    else:
        ends = settled(spec.retention, closing, tuple(after), state.anchor)
    anchors, weights, moved, broken = border_guard(closing, state.anchor, ends, tuple(momentum), gone)
    read = {"after": weights, "before": before, "boundary": state.anchor}[spec.read]
    q = x.q[:, :, t, None]
    stands = anchors if spec.read == "after" else state.anchor
    own = [linked(spec.retention, w, a) for w, a in zip(read, stands, strict=True)]
    y = spec.network.apply(at(own), q)[:, :, 0]
    y = torch.where(alive.to(y.device).view(-1, 1, 1), y, 0.0)

    tail = state.tail
    if tail is not None:
        tail = shift_tail(tail, x.k[:, :, t, None], x.v[:, :, t, None], fine[:, None], alive)
    skipped = ~(fine & finite | broken) & alive.to(fine.device)
    faults = state.faults + broken.long() + skipped.long()
    return y, MemoryState(anchors, weights, moved, tail, position, faults), broken


def _gradients(
    spec: MemorySpec, x: Inputs, anchor: Weights, keys: Tensor, values: Tensor, used: Tensor, t: int
) -> tuple[Weights, Tensor]:
    """Σ_i γ_i ∇ℓ_i at the anchor, and per lane whether the token's own gradient is finite; others are dropped singly."""
    leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in anchor)
    total = tuple(torch.zeros_like(w) for w in anchor)
    own = used[:, -1]

    def gradient(key: Tensor, value: Tensor) -> tuple[Weights, Tensor]:
        loss = spec.bias.loss(spec.network.apply(at(leaves), key), value).sum()
        found = torch.autograd.grad(loss, leaves, create_graph=True)
        flat = sum(g.sum((1, 2, 3)) for g in found)
        assert isinstance(flat, Tensor)
        return found, torch.isfinite(flat)

    for i in range(keys.shape[2]):
        key, value = keys[:, :, i, None], values[:, :, i, None]
        found, finite = gradient(key, value)
        if not surely(
            finite
        ):  # made again without them, whose derivatives are no numbers either, and 0 times these neither
            place = finite.view(-1, 1, 1, 1)
            found, _ = gradient(torch.where(place, key, 0.0), torch.where(place, value, 0.0))
        weight = (used[:, i] & finite).view(-1, 1, 1, 1).to(keys.dtype)
        if x.window is not None:
            weight = weight * x.window[:, :, t, keys.shape[2] - 1 - i, None, None]
        keep = finite.view(-1, 1, 1, 1)
        total = tuple(s + weight * torch.where(keep, g, 0.0) for s, g in zip(total, found, strict=True))
        own = finite
    return total, own


def layer_inputs(network: Network, anchor: Weights, k: Tensor) -> list[Tensor]:
    """Each layer's own input at the anchor `[lane, head, in]`, for one token k `[lane, head, 1, key_dim]`."""
    seen: list[Tensor] = []

    def linear(layer: int, h: Tensor) -> Tensor:
        seen.append(h[:, :, 0])
        return h @ anchor[layer]

    network.apply(linear, k)
    return seen


def detach(state: MemoryState) -> MemoryState:
    """The same state without its history."""

    def all_of(weights: Weights) -> Weights:
        return tuple(w.detach() for w in weights)

    tail = state.tail
    if tail is not None:
        tail = tail._replace(key=tail.key.detach(), value=tail.value.detach())
    return state._replace(
        anchor=all_of(state.anchor), weights=all_of(state.weights), momentum=all_of(state.momentum), tail=tail
    )
