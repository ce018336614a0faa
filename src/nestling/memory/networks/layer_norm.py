"""The layer norm inside a memory, of gain 1 and shift 0. A gain would also weight the inner error's coordinates by its square."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-6  # inside the root


def normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized z and the scale 1/σ."""
    centered = z - z.mean(-1, keepdim=True)
    square = centered.square().mean(-1, keepdim=True) + EPS
    scale = square.sqrt() / square  # 1/∞ would be 0, and what is no number any more look like one
    return centered * scale, scale


def back(error: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The error before the norm: without the parts along 1 and along the normalized output."""
    along = (error * normed).mean(-1, keepdim=True)
    return scale * (error - error.mean(-1, keepdim=True) - normed * along)
