"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """x `[lane, time, head, dim]` turned by position `[lane, time]` · base^(−2i/dim) in pair i."""
    half = x.shape[-1] // 2
    cos, sin = (f.unsqueeze(2) for f in angles(position, x.shape[-1], base, x.dtype))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def angles(position: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which positions turn vectors of width dim, `[…, dim / 2]`.

    Angles are computed in float64, so that far positions stay exact.
    """
    half = dim // 2
    frequency = base ** (-torch.arange(half, device=position.device, dtype=torch.float64) / half)
    angle = position.double()[..., None] * frequency
    return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """`rotate` into `out`, without a graph; cos and sin are of x's shape but for half its width, or can be expanded to it."""
    half = x.shape[-1] // 2
    a, b, first, second = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(a, cos, out=first).sub_(b * sin)
    torch.mul(b, cos, out=second).add_(a * sin)
    return out
