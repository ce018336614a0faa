"""Smooth stand-ins for the parts of a loss that have a kink (Miras, remark 5 and §5.4): sign(x) ≈ tanh(ax), |x| ≈ √(x² + ε).

The outer loop learns through the inner gradient; sign(e) would send nothing back. The paper gives ε = 1e-6 and no slope.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

EPS = 1e-6  # under the root; half precision cannot hold it, and engines compute in at least float32
NODES = 96


def sign(x: Tensor, slope: float | None) -> Tensor:
    """tanh(slope · x); without a slope the exact sign."""
    return torch.sign(x) if slope is None else torch.tanh(slope * x)


def power(x: Tensor, exponent: float) -> Tensor:
    """(x² + ε)^{exponent/2} ≈ |x|^exponent."""
    return (x.square() + EPS) ** (exponent / 2)


def exact_power(x: Tensor, exponent: float) -> Tensor:
    """|x|^exponent, 0 and of slope 0 where x is 0: below an exponent of 1 the slope there is infinite, and 0 · ∞ no number."""
    zero = x == 0
    return torch.where(zero, 0.0, x.masked_fill(zero, 1.0).abs() ** exponent)


@lru_cache(maxsize=1)
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights on [0, 1], drawn towards 0, where the integrands have their bend: s = u⁴."""
    u, weight = np.polynomial.legendre.leggauss(NODES)
    u, weight = (u + 1) / 2, weight / 2
    return u**4, 4 * u**3 * weight


def signed_power_integral(x: Tensor, exponent: float, slope: float) -> Tensor:
    """∫₀ˣ tanh(slope · s) (s² + ε)^{exponent/2} ds, which has no closed form; even in x. By quadrature, to about 1e-10."""
    nodes, weights = (torch.as_tensor(part, dtype=x.dtype, device=x.device) for part in _quadrature())
    s = x.unsqueeze(-1) * nodes
    return x * (sign(s, slope) * power(s, exponent) * weights).sum(-1)
