"""The non-linearity φ of a compression layer with its transposed Jacobian, and f between two of them (Trellis, §3.2).

φ          φ(z)                  J_φ(z)ᵀ e
identity   z                     e
silu       z σ(z)                φ'(z) ∘ e
tanh       tanh z                (1 − φ²) ∘ e
softmax    p = softmax(z)        p ∘ (e − p·e)
l2         n = z/‖z‖             (e − n (n·e))/‖z‖
ln         layer norm            without the parts along 1 and along φ(z), over σ

f          f(x)
ln_silu    LayerNorm(SiLU(x))    without gain and shift
l2_silu    SiLU(x)/‖SiLU(x)‖
softmax    softmax(x)
identity   x
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.networks import layer_norm
from nestling.memory.networks.activation import activate_with_slope
from nestling.memory.norm import EPS, l2_norm

PHI = ("identity", "silu", "tanh", "softmax", "l2", "ln")
BETWEEN = ("ln_silu", "l2_silu", "softmax", "identity")


def compress(name: str, z: Tensor) -> Tensor:
    """φ(z) along the last dimension."""
    if name == "silu":
        return F.silu(z)
    if name == "tanh":
        return z.tanh()
    if name == "softmax":
        return z.softmax(-1)
    if name == "l2":
        return l2_norm(z)
    return layer_norm.normalize(z)[0] if name == "ln" else z


def pulled_back(name: str, z: Tensor, target: Tensor, *, predicts: bool = True) -> Tensor:
    """u = J_φ(z)ᵀ(φ(z) − target), or −J_φ(z)ᵀ target where nothing is predicted."""
    slope = scale = None
    if name == "silu":
        y, slope = activate_with_slope("silu", z)
    elif name == "ln":
        y, scale = layer_norm.normalize(z)
    else:
        y = compress(name, z)
    e = y - target if predicts else -target
    if slope is not None:
        return e * slope
    if scale is not None:
        return layer_norm.back(e, y, scale)
    if name == "tanh":
        return e * (1 - y.square())
    if name == "softmax":
        return y * (e - (y * e).sum(-1, keepdim=True))
    if name == "l2":
        return (e - y * (y * e).sum(-1, keepdim=True)) * torch.rsqrt(z.square().sum(-1, keepdim=True) + EPS**2)
    return e


def between(name: str, x: Tensor) -> Tensor:
    """f(x) along the last dimension."""
    if name == "ln_silu":
        return layer_norm.normalize(F.silu(x))[0]
    if name == "l2_silu":
        return l2_norm(F.silu(x))
    return x.softmax(-1) if name == "softmax" else x
