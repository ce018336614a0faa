"""The definition of a memory over exponential features: lane after lane, token after token, gradients by autograd on the written
loss (Atlas, §4). Slow on purpose; the equations stand in `kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.features.exponential import CAP
from nestling.memory.kernel import KernelMemory, KernelState, Pairs, Streams
from nestling.memory.state import Tail, Weights
from nestling.state import detach, split, stack


class Sum(NamedTuple):
    """Σ_j a_j φ*(k_j)ᵀ u_j of one lane: keys and writes `[head, n, dim]`, a `[head, n]`."""

    key: Tensor
    write: Tensor
    weight: Tensor


class Seen(NamedTuple):
    """The tokens that a step reads: keys and values `[head, n, dim]`, ok bool `[n]`: they may be used."""

    key: Tensor
    value: Tensor
    ok: Tensor


def scan(spec: KernelMemory, x: Streams) -> tuple[Tensor, KernelState]:
    """Token by token. Works under `no_grad`; refuses `inference_mode`, where autograd cannot run."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("engine='reference' differentiates by autograd: call it outside torch.inference_mode()")
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        states, outputs, starts = [], [], split(x.start)
        for lane, state in enumerate(split(x.state)):
            y, state = _lane(spec, x, lane, state, starts[lane])
            outputs.append(y)
            states.append(state)
        y, new = torch.stack(outputs), stack(states)
    return (y, new) if outer else (y.detach(), detach(new))


def _lane(
    spec: KernelMemory, x: Streams, lane: int, state: KernelState, start: KernelState
) -> tuple[Tensor, KernelState]:
    silence, read = x.v.new_zeros(x.v.shape[1], spec.value_dim), list[Tensor]()
    for t in range(x.q.shape[2]):
        if x.valid is not None and not x.valid[lane, t]:
            read.append(silence)
            continue
        if x.reset is not None and x.reset[lane, t]:
            state = start._replace(faults=state.faults)
        y, state = (_grown if spec.span is None else _spanned)(spec, x, lane, t, state)
        read.append(y)
    return (torch.stack(read, 1) if read else silence.new_zeros(x.v.shape[1], 0, spec.value_dim)), state


def summed(spec: KernelMemory, theta: Tensor, pairs: Sum, x: Tensor) -> Tensor:
    """Σ a κ(k, x) u of x `[head, n, key_dim]`, over Σ a κ(k, x) if normalized."""
    product = torch.einsum("hnd,hmd->hnm", x, pairs.key) - (1.0 if spec.kernel.unit_peak else 0.0)
    exponent, weight = theta.exp() * product, pairs.weight.unsqueeze(1)
    if spec.normalized and exponent.shape[-1] > 0:  # the largest divides out, so that no exponent needs a cap
        counts = (weight != 0).expand_as(exponent)
        top = exponent.detach().masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
        exponent = exponent - torch.where(counts.any(-1, keepdim=True), top, 0.0)
    shares = exponent.clamp_max(CAP).exp() * weight
    total = torch.einsum("hnm,hmo->hno", shares, pairs.write)
    if not spec.normalized:
        return total
    size = shares.sum(-1, keepdim=True)
    return total / torch.where(size > 0, size, 1.0)


def answer(spec: KernelMemory, theta: Tensor, weights: Weights, pairs: Sum, x: Tensor) -> Tensor:
    """M(x): weights `[head, in, out]`, x `[head, n, key_dim]`."""

    def linear(layer: int, h: Tensor) -> Tensor:
        return h @ weights[layer] + (summed(spec, theta, pairs, h) if layer == 0 else 0.0)

    return spec.network.apply(linear, x)


def gradients(
    spec: KernelMemory, theta: Tensor, weights: Weights, pairs: Sum, seen: Seen
) -> tuple[Tensor, Weights, Tensor]:
    """Of each token ∂ℓ/∂z(k) `[head, n, out]` and ∂ℓ/∂W of the later layers `[head, n, in, out]`, and whether all of it is
    finite, bool `[n]`; where not, it is 0. Every token has weights of its own, so that autograd keeps them apart."""
    count = seen.key.shape[1]
    own = tuple(w.unsqueeze(1).expand(-1, count, -1, -1) for w in weights[1:])
    leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in own)
    probe = torch.zeros_like(seen.key @ weights[0]).requires_grad_()

    def linear(layer: int, h: Tensor) -> Tensor:
        if layer > 0:
            return torch.einsum("hni,hnio->hno", h, leaves[layer - 1])
        return h @ weights[0] + summed(spec, theta, pairs, h) + probe

    loss = spec.bias.loss(spec.network.apply(linear, seen.key), seen.value).sum()
    error, *later = torch.autograd.grad(loss, (probe, *leaves), create_graph=True)
    finite = torch.isfinite(
        torch.stack([seen.key.sum((0, 2)), error.sum((0, 2)), *(g.sum((0, 2, 3)) for g in later)])
    ).all(0)
    error = torch.where(finite[:, None], error, 0.0)
    return error, tuple(torch.where(finite[:, None, None], g, 0.0) for g in later), finite


def _grown(spec: KernelMemory, x: Streams, lane: int, t: int, state: KernelState) -> tuple[Tensor, KernelState]:
    assert state.pairs is not None
    position, c = int(state.position), spec.bias.window
    anchor, weights = tuple(w[0] for w in state.anchor), tuple(w[0] for w in state.weights)
    count = spec.count(position)
    key, write, weight, still = (part[0, :count].transpose(0, 1) for part in state.pairs)
    at_anchor = Sum(key, write, still)
    fine = x.fine[lane, t]
    own = Seen(x.k[lane, :, t : t + 1], x.v[lane, :, t : t + 1], fine[None])

    # What the window's tokens write, with gradients taken anew at this chunk's anchor.
    window = _joined(state.tail, own)
    errors, later, finite = gradients(spec, x.theta, anchor, at_anchor, window)
    ok = window.ok & finite
    made = slice(0, None) if position % spec.chunk == 0 else slice(-1, None)
    keep = ok[made, None]
    key = torch.cat([key, torch.where(keep, window.key[:, made], 0.0)], 1)
    write = torch.cat([write, torch.where(keep, -errors[:, made], 0.0)], 1)
    new = torch.nn.functional.pad(weight, (0, key.shape[1] - count))
    still = torch.nn.functional.pad(still, (0, key.shape[1] - count))

    before = weights, new
    if fine:
        if x.retention is not None:
            share = x.retention.plain()[lane, :, t]
            weights = tuple(share[:, None, None] * w for w in weights)
            new = share[:, None] * new
        for lag in range(c):
            if ok[-1 - lag]:
                step = x.lr[lane, :, t] * (1.0 if x.window is None else x.window[lane, :, t, lag])
                place = torch.zeros_like(new)
                place[:, -1 - lag] = 1.0
                new = new + step[:, None] * place
                moved = (w - step[:, None, None] * g[:, -1 - lag] for w, g in zip(weights[1:], later, strict=True))
                weights = (weights[0], *moved)

    broken = not torch.isfinite(torch.stack([new.sum(), *(w.sum() for w in weights)])).all()
    if broken:
        weights, new = anchor, still
    w, a = {"after": (weights, new), "before": before, "boundary": (anchor, still)}[spec.read]
    y = answer(spec, x.theta, w, Sum(key, write, a), x.q[lane, :, t : t + 1])[:, 0]

    position, faults = position + 1, state.faults + (~ok[-1] | broken).long()
    if position % spec.chunk == 0:
        anchor, still = weights, new
    pairs = Pairs(*(part.transpose(0, 1)[None] for part in (key, write, new, still)))
    first, now = (tuple(w[None] for w in side) for side in (anchor, weights))
    tail = None if state.tail is None else _tail(window)
    return y, KernelState(first, now, pairs, tail, torch.tensor([position]), faults)


def _spanned(spec: KernelMemory, x: Streams, lane: int, t: int, state: KernelState) -> tuple[Tensor, KernelState]:
    """W = W_0 − Σ η_i ∇ℓ(W_0; k_i, v_i) over the span that ends where the read stands."""
    assert spec.span is not None
    own = Seen(x.k[lane, :, t : t + 1], x.v[lane, :, t : t + 1], x.fine[lane, t][None])
    known = _joined(state.tail, own)
    position = int(state.position)
    end = known.key.shape[1] - {"after": 0, "before": 1, "boundary": position % spec.chunk + 1}[spec.read]
    span = slice(max(0, end - spec.span), end)
    some = Seen(known.key[:, span], known.value[:, span], known.ok[span])
    first = x.initial[0]
    nothing = Sum(own.key[:, :0], first.new_zeros(len(first), 0, first.shape[-1]), first.new_zeros(len(first), 0))

    def found(seen: Seen) -> tuple[Tensor, Weights, Tensor]:
        return gradients(spec, x.theta, x.initial, nothing, seen._replace(value=seen.value[..., :-1]))

    errors, later, finite = found(some)
    ok = some.ok & finite
    lr = torch.where(ok, some.value[..., -1], 0.0)
    moved = (w - torch.einsum("hn,hnio->hio", lr, g) for w, g in zip(x.initial[1:], later, strict=True))
    weights = (first, *moved)
    pairs = Sum(torch.where(ok[:, None], some.key, 0.0), -errors, lr)
    y = answer(spec, x.theta, weights, pairs, x.q[lane, :, t : t + 1])[:, 0]
    lost = ~(own.ok & found(own)[2])
    return y, state._replace(tail=_tail(known), position=state.position + 1, faults=state.faults + lost.long())


def _joined(tail: Tail | None, own: Seen) -> Seen:
    """The tail's tokens and then the token itself."""
    if tail is None:
        return own
    return Seen(
        torch.cat([tail.key[0], own.key], 1), torch.cat([tail.value[0], own.value], 1), torch.cat([tail.ok[0], own.ok])
    )


def _tail(seen: Seen) -> Tail:
    """All but the oldest, with a lane in front."""
    ok = seen.ok[None, 1:]
    return Tail(seen.key[None, :, 1:], seen.value[None, :, 1:], ok).only(ok)
