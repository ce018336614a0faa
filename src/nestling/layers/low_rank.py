"""What a lane has learned, kept as a product of two thin matrices, so that thousands of lanes fit beside one set of slow weights.

    X ≈ L R,  L `[out, rank]`, R `[rank, in]`

the closest matrix of that rank (Eckart and Young): X projected on its leading singular vectors of the shorter side, P X or X P.
It is X itself, to rounding, where X has no higher rank; what is left out otherwise is the part behind the rank-th singular value.
To the outer gradient the projection is a constant (ours: where singular values lie close, their vectors have no usable slope).
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


def like(x: Tensor, old: Kept) -> Kept:
    """A matrix `[lane, out, in]` in the form of `old`; one with numbers that are not finite stays so."""
    if isinstance(old, Tensor):
        return x
    rank, wide = old.left.shape[-1], x.shape[-1] > x.shape[-2]
    given = x.detach()
    sound = given.sum((1, 2)).isfinite()[:, None, None]
    u, size, v = torch.linalg.svd(torch.where(sound, given, 0.0), full_matrices=False)
    real = size > size[:, :1] * (torch.finfo(size.dtype).eps * max(x.shape[1:]))  # the others' directions are rounding
    if wide:
        basis = (u * real[:, None])[:, :, :rank]
        return LowRank(basis, _product(basis.mT, x))
    basis = (v * real[:, :, None])[:, :rank]
    return LowRank(_product(x, basis.mT), basis)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the precision that the matrices have, also where products of slow weights are computed in less."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
