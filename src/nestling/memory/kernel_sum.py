"""The engine's sum over pairs as one step of autograd, block of keys by block of keys.

    z_t = Σ_j a_tj κ(k_j, x_t) u_j        normalized: over Σ_j a_tj κ(k_j, x_t)

The shares a κ are as many as tokens times pairs. They are made in blocks that stay in the cache, in the forward pass and again in
the backward pass, and never kept (as in FlashAttention). With P = κ, A = a ∘ P, N the sum, D the kernels' sum and E the exponent,

    dN = dz/D      dD = −dz·z/D      G = dN Uᵀ + dD      dU = Aᵀ dN      da = P ∘ G      dE = A ∘ G

A second derivative, and a compiler, which fuses by itself, take the formula as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.features.exponential import CAP
from nestling.memory.fused import again, flat

BLOCK = 512  # keys at a time


class Sum(NamedTuple):
    """Terms of a sum: some pairs, `[…, n, dim]`, with weights of their own `[…, 1, n]`, or for every token `[…, t, n]`."""

    key: Tensor
    write: Tensor
    weight: Tensor


class Kind(NamedTuple):
    """What the sum is. rows: how many of the pairs' sets have weights of their own, which are taken `share` of."""

    normalized: bool
    unit_peak: bool
    rows: int


def summed(kind: Kind, x: Tensor, theta: Tensor, share: Tensor | None, sets: Sequence[Sum]) -> Tensor:
    """z `[lane, head, t, out]` of x `[lane, head, t, dim]`, over all sets of pairs, those with weights of their own first.

    theta   log s `[head, 1, 1]`
    share   γ `[lane, head, t, 1]`: what is left of the weights of the pairs that have their own;  None: all
    """
    lead = x.shape[:-2]
    some = [part for part in sets[: kind.rows] if part.key.shape[-2]]
    kind, sets = kind._replace(rows=len(some)), [*some, *sets[kind.rows :]]
    if not sets:
        return x.new_zeros(())
    share = share if some else None  # nothing of its gradient comes from here, and a second derivative would miss it
    tensors = [flat(lead, u, 2) for u in (x, theta, share, *(u for part in sets for u in part))]
    compiling = torch.compiler.is_compiling()
    z: Tensor = _formula(kind, *tensors) if compiling else _Sum.apply(kind, *tensors)  # type: ignore[no-untyped-call]
    return z.view(*lead, *z.shape[-2:])


def _formula(kind: Kind, x: Tensor, theta: Tensor, share: Tensor | None, *sets: Tensor) -> Tensor:
    keys, writes = torch.cat(sets[0::3], -2), torch.cat(sets[1::3], -2)
    rows = [w if share is None else share * w for w in sets[2::3][: kind.rows]]
    weight = torch.cat([w.expand(-1, x.shape[-2], -1) for w in (*rows, *sets[2::3][kind.rows :])], -1)
    product = x @ keys.mT
    exponent = theta.exp() * (product - 1 if kind.unit_peak else product)
    if not kind.normalized:
        return (exponent.clamp_max(CAP).exp() * weight) @ writes
    top = exponent.detach().masked_fill(weight.detach() == 0, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)  # divides out, as softmax does
    shares = (exponent - top).clamp_max(CAP).exp() * weight
    total = shares.sum(-1, keepdim=True)
    return (shares @ writes) / torch.where(total > 0, total, 1.0)


class _Block(NamedTuple):
    """Some keys of a set: which set, where in it, and whether their weights are their own."""

    number: int
    place: slice
    own: bool
    key: Tensor
    write: Tensor
    weight: Tensor


def _blocks(kind: Kind, sets: Sequence[Tensor]) -> Iterator[_Block]:
    for number in range(len(sets) // 3):
        key, write, weight = sets[3 * number : 3 * number + 3]
        for first in range(0, key.shape[-2], BLOCK):
            place = slice(first, first + BLOCK)
            yield _Block(number, place, number < kind.rows, key[:, place], write[:, place], weight[..., place])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind, x: Tensor, theta: Tensor, share: Tensor | None, *sets: Tensor) -> Tensor:
        scale = theta.exp()
        scaled = scale * x
        peak = scale if kind.unit_peak else torch.zeros_like(scale)
        z = x.new_zeros(*x.shape[:-1], sets[1].shape[-1])
        total = x.new_zeros(*x.shape[:-1], 1)
        top = x.new_full((*x.shape[:-1], 1), -torch.inf) if kind.normalized else peak.expand(-1, x.shape[-2], 1)
        over = False
        for block in _blocks(kind, sets):
            p = scaled @ block.key.mT
            own = block.own and share is not None
            if kind.normalized:
                whole = bool(block.weight.all())
                counted = p if whole else p.masked_fill(block.weight == 0, -torch.inf)
                if own and share is not None and not bool(share.all()):
                    whole, counted = False, counted.masked_fill(share == 0, -torch.inf)
                higher = torch.maximum(top, counted.amax(-1, keepdim=True))
                less = torch.where(torch.isfinite(top), top - higher, 0.0).exp_()  # of a smaller largest exponent
                top = higher
                z.mul_(less)
                total.mul_(less)
                p.sub_(torch.where(torch.isfinite(top), top, peak))
                p = p if whole else p.clamp_max_(CAP)
            else:
                p.sub_(top)
                if bool(p.amax() > CAP):
                    over = True
                    p.clamp_max_(CAP)
            p.exp_().mul_(block.weight)
            if not own:
                z.baddbmm_(p, block.write)
                total.add_(p.sum(-1, keepdim=True)) if kind.normalized else None
            else:
                assert share is not None
                z.addcmul_(share, p @ block.write)
                total.addcmul_(share, p.sum(-1, keepdim=True)) if kind.normalized else None
        if kind.normalized:
            top = torch.where(torch.isfinite(top), top, peak)
            z.div_(torch.where(total > 0, total, 1.0))
        ctx.kind, ctx.over = kind, over
        ctx.save_for_backward(x, theta, share, *sets, z, total, top)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *given, z, total, top = ctx.saved_tensors
        kind: Kind = ctx.kind
        if torch.is_grad_enabled():
            return None, *again(lambda *u: _formula(kind, *u), tuple(given), grad)
        x, theta, share, *sets = given
        scale = theta.exp()
        scaled, d_total = scale * x, None
        if kind.normalized:
            divides = total > 0
            grad = grad / torch.where(divides, total, 1.0)
            d_total = torch.where(divides, (grad * z).sum(-1, keepdim=True).neg_(), 0.0)
        grad = grad.contiguous()
        shares = torch.ones_like(x[..., :1]) if share is None else share
        d_x, d_shift, d_share = torch.zeros_like(x), torch.zeros_like(shares), torch.zeros_like(shares)
        found = [torch.empty_like(u, memory_format=torch.contiguous_format) for u in sets]
        for block in _blocks(kind, sets):
            d_key, d_write, d_weight = found[3 * block.number : 3 * block.number + 3]
            left = shares if block.own else None
            p, above = (scaled @ block.key.mT).sub_(top), None
            if ctx.over or (kind.normalized and not bool(block.weight.all())):
                above = p > CAP
                p.clamp_max_(CAP)
            p.exp_()
            d_write[:, block.place] = (p * block.weight).mT @ (grad if left is None else left * grad)
            of = grad @ block.write.mT if d_total is None else torch.baddbmm(d_total, grad, block.write.mT)
            q = p.mul_(of)  # the gradient of a, before its share
            if left is None:
                d_weight[..., block.place] = q
            else:
                d_weight[..., block.place] = left.mT @ q
                d_share.baddbmm_(q, block.weight.mT)
            q.mul_(block.weight)
            if above is not None:
                q.masked_fill_(above, 0.0)
            moved = q @ block.key
            d_x = d_x.add_(moved) if left is None else d_x.addcmul_(left, moved)
            d_key[:, block.place] = q.mT @ (scaled if left is None else left * scaled)
            if kind.unit_peak:
                d_shift.sub_(q.sum(-1, keepdim=True) if left is None else left * q.sum(-1, keepdim=True))
        d_theta = scale * ((d_x * x).sum(-1, keepdim=True) + d_shift).sum(-2, keepdim=True)
        return None, d_x.mul_(scale), d_theta, None if share is None else d_share, *found
