"""What a lane has learned, kept as a product of two thin matrices, so that thousands of lanes fit beside one set of slow weights.

    X ≈ L R,  L `[out, rank]`, R `[rank, in]`

the closest matrix of that rank (Eckart and Young): X projected on its leading singular vectors of the shorter side, P X or X P.
It is X itself, to rounding, where X has no higher rank; what is left out otherwise is the part behind the rank-th singular value.
To the outer gradient of first order the projection is a constant (ours). Beyond first order P moves with X, by perturbation
theory, with u_i its vectors, σ_i the singular values and S = X Xᵀ on the shorter side:

    du_i = Σ_j u_j (u_jᵀ dS u_i) / (σ_i² − σ_j²)        i kept, j left out

which is exact wherever the closest matrix has a slope, σ_r > σ_{r+1}. Where they are equal, to rounding, it has none, and those
terms are left out. Where X has no rank beyond r, neither here nor near by, the slope is that of X itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.state import register


@register
class LowRank(NamedTuple):
    """left `[lane, out, rank]`, right `[lane, rank, in]`. The one on the shorter side has orthonormal vectors, or zeros where
    fewer are needed."""

    left: Tensor
    right: Tensor


Kept = Tensor | LowRank
"""A matrix per lane, `[lane, out, in]`, in full or as a product."""


class Whole(NamedTuple):
    """A matrix per lane `[lane, out, in]` that stands in the place of the weight, not beside it."""

    matrix: Tensor


def used(weight: Tensor, moved: Kept | Whole) -> Tensor:
    """The matrix that a lane uses, in full."""
    return moved.matrix if isinstance(moved, Whole) else weight + full(moved)


def pays(shape: torch.Size | tuple[int, ...], rank: int | None) -> bool:
    """Whether a product of this rank is smaller than the matrix `[…, out, in]`."""
    return rank is not None and rank * (shape[-2] + shape[-1]) < shape[-2] * shape[-1]


def zeros(weight: Tensor, lanes: int, rank: int | None) -> Kept:
    """0 for a weight `[out, in]`, in at least float32."""

    def empty(*shape: int) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(lanes, *shape, dtype=dtype, device=weight.device)

    if not pays(weight.shape, rank):
        return empty(*weight.shape)
    assert rank is not None
    return LowRank(empty(weight.shape[0], rank), empty(rank, weight.shape[1]))


def full(x: Kept) -> Tensor:
    """The matrix."""
    return x if isinstance(x, Tensor) else _product(x.left, x.right)


def like(x: Tensor, old: Kept, *, exact: bool = False) -> Kept:
    """A matrix `[lane, out, in]` in the form of `old`; one with numbers that are not finite stays so. exact: to the gradient the
    projection is no constant.
    """
    if isinstance(old, Tensor):
        return x
    rank, wide = old.left.shape[-1], x.shape[-1] > x.shape[-2]
    given = x.detach()
    sound = given.sum((1, 2)).isfinite()[:, None, None]
    u, size, v = torch.linalg.svd(torch.where(sound, given, 0.0), full_matrices=False)
    smallest = size[:, :1] * (torch.finfo(size.dtype).eps * max(x.shape[1:]))
    real = size > smallest  # the others' directions are rounding
    short, vectors = (x, u) if wide else (x.mT, v.mT)
    basis = (vectors * real[:, None])[:, :, :rank]
    if exact and x.requires_grad:
        left_out = ~real
        left_out[:, rank:] = True
        gap = size[:, None, :rank].square() - size[:, :, None].square()
        usable = left_out[:, :, None] & real[:, None, :rank] & (gap > smallest[..., None] * size[:, :1, None])
        weight = torch.where(usable, 1 / torch.where(usable, gap, 1.0), 0.0)
        still = short.detach()
        change = torch.where(sound, short - still, 0.0)  # 0, with a slope
        turned = _product(change, _product(still.mT, basis)) + _product(still, _product(change.mT, basis))
        basis = basis + _product(vectors, weight * _product(vectors.mT, turned))
    other = _product(basis.mT, short)
    return LowRank(basis, other) if wide else LowRank(other.mT, basis.mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the precision that the matrices have, also where products of slow weights are computed in less."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
