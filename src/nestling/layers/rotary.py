"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """x `[lane, time, head, dim]` turned by position `[lane, time]` · base^(−2i/dim) in pair i.

    Angles are computed in float64, so that far positions stay exact.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.double()[..., None] * frequency
    cos, sin = (f(angle).to(x.dtype).unsqueeze(2) for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
