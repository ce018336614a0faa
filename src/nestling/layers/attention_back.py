"""The way back through the attention of a call's tokens over all that they see, from what its forward pass has kept:

    D = Σ_channels y ∘ ∂y,   P = exp(q Kᵀ/√d − L),   S = P ∘ (∂y Vᵀ − D)          L the logarithm of the softmax's sum
    ∂q = S K/√d,  ∂K = Sᵀ q/√d,  ∂V = Pᵀ ∂y

a tile of keys after the other. ∂K and ∂V are added to what is there, so that many calls share one sum, and from a given key on
only, as a window's own gradient asks for those of its own tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.layers.attention_in_c import Read, back_in_c

__all__ = ["Read", "attention_back"]

TILE = 512
"""Keys that the framework's operations take at once, so that what they make of them stays in the cache."""


def attention_back(read: Read, grad: Tensor, sums: Tensor) -> Tensor:
    """∂q, like q, of grad, like y. sums `[2, lane, head, n, dim]`: ∂K and ∂V of the last n keys are added to; n is `time`, or all
    there are."""
    of_q = torch.empty_like(read.q, memory_format=torch.contiguous_format)
    if not back_in_c(read, grad, sums, of_q):
        scale = read.q.shape[3] ** -0.5
        q, grad, log = (u.contiguous() for u in (read.q * scale, grad, read.log))
        _plainly(read, q, grad, log, (grad * read.y).sum(-1), of_q.zero_(), sums)
        of_q.mul_(scale)
    return of_q


def _plainly(read: Read, q: Tensor, grad: Tensor, log: Tensor, mean: Tensor, of_q: Tensor, sums: Tensor) -> None:
    """q comes scaled, and of_q is to be."""
    visible, edge, time = read.visible, read.edge, q.shape[2]
    q, grad, of_q, log, mean = (u.flatten(0, 1) for u in (q, grad, of_q, log.unsqueeze(-1), mean.unsqueeze(-1)))
    begin = visible + time - sums.shape[3]
    for first in (*range(0, visible, TILE), visible):
        last = min(first + TILE, visible) if first < visible else first + time
        keys, values = (u.flatten(0, 1) for u in read.pairs[..., first:last, :])
        share = torch.baddbmm(log, q, keys.mT, beta=-1).clamp_(max=0.0).exp_()  # rounding aside it is
        if first == visible:
            share.tril_()
        elif first < edge + time - 1:
            share[..., : edge + time - 1 - first].triu_(edge - first)
        slope = torch.baddbmm(mean, grad, values.mT, beta=-1).mul_(share)
        of_q.baddbmm_(slope, keys)
        if first >= begin:
            of_keys, of_values = (u.flatten(0, 1) for u in sums[..., first - begin : last - begin, :])
            of_keys.baddbmm_(slope.mT, q)
            of_values.baddbmm_(share.mT, grad)
