"""σ(z) together with σ'(z): what a forward pass and the inner gradient need at once."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("gelu", "gelu_tanh", "silu")


def activate(name: str, z: Tensor) -> Tensor:
    """σ(z)."""
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_with_slope(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """σ(z) and σ'(z), both differentiable."""
    if name == "gelu":
        if torch.compiler.is_compiling():  # a compiler fuses the passes by itself
            cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
            return z * cdf, cdf + z * torch.exp(-0.5 * z.square()) * (1 / math.sqrt(2 * math.pi))
        h, slope = _Gelu.apply(z)  # type: ignore[no-untyped-call]
        return h, slope
    if name == "silu":
        gate = z.sigmoid()
        h = z * gate
        return h, gate + h * (1 - gate)
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (z + 0.044715 * z.pow(3)))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z.square())


class _Gelu(torch.autograd.Function):
    """zΦ(z) and Φ(z) + zφ(z) by the framework's fused kernels; σ''(z) = φ(z)(2 − z²).

    Left to autograd, the slope alone is a dozen passes over the widest tensor of a memory, and half of its training time.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(z.new_ones(()).expand_as(z), z)
        ctx.save_for_backward(z, slope)
        return F.gelu(z), slope

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_slope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        square = z.square()
        curvature = (-0.5 * square).exp() * (2 - square)
        return torch.addcmul(grad_h * slope, grad_slope, curvature, value=1 / math.sqrt(2 * math.pi))
