"""The norm of keys and queries."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-6


def l2_norm(x: Tensor) -> Tensor:
    """x / √(‖x‖² + ε²) along the last dimension, in at least float32 inside; its gradient is bounded at 0."""
    up = x.float() if x.dtype.itemsize < 4 else x
    return (up * (up.square().sum(-1, keepdim=True) + EPS**2).rsqrt()).to(x.dtype)
