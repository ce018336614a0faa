"""σ(z) together with σ'(z): what a forward pass and the inner gradient need at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715  # of the tanh approximation
FAR = 1e4  # of z², beyond which σ' is 0 or 1 and σ'' is 0 to the last digit: larger powers would overflow, and ∞ · 0 is no number
NAMES = ("gelu", "gelu_tanh", "silu")


def activate(name: str, z: Tensor) -> Tensor:
    """σ(z)."""
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_with_slope(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """σ(z) and σ'(z), both differentiable."""
    if torch.compiler.is_compiling():  # a compiler fuses the passes by itself
        h, slope, _ = _PARTS[name](z)
        return h, slope
    h, slope = _Activation.apply(name, z)  # type: ignore[no-untyped-call]
    return h, slope


def _gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """zΦ(z), Φ(z) + zφ(z), φ(z)(2 − z²)."""
    square = z.square().clamp_max(FAR)
    density = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return z * cdf, torch.addcmul(cdf, z, density), density * (2 - square)


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z(1 + t)/2 with t = tanh(u), u = √(2/π)(z + cz³), so that t' = (1 − t²)u'."""
    square = z.square().clamp_max(FAR)
    t = torch.tanh(ROOT * z * (1 + CUBIC * square))
    inner = ROOT * (1 + 3 * CUBIC * square)
    rise = (1 - t.square()) * inner
    bend = (1 - t.square()) * (6 * ROOT * CUBIC * z) - 2 * t * rise * inner
    half = 0.5 * (1 + t)
    return z * half, torch.addcmul(half, z, rise, value=0.5), torch.addcmul(rise, z, bend, value=0.5)


def _silu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """zs with s = σ(z), s + zs(1 − s), s(1 − s)(2 + z(1 − 2s))."""
    s = z.sigmoid()
    h, rise = z * s, s * (1 - s)
    return h, torch.addcmul(s, z, rise), rise * (2 + z * (1 - 2 * s))


_PARTS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}
"""σ, σ' and σ'' of every activation."""


class _Activation(torch.autograd.Function):
    """The same, and the gradient of both at once, in as few passes as can be and in place.

    Left to autograd, the slope alone is a dozen passes over the widest tensor of a memory, and half of its training time.
    """

    @staticmethod
    def forward(ctx: Any, name: str, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.name = name
        h, slope, inner = _FORWARD[name](z)
        ctx.save_for_backward(z, slope, inner)
        return h, slope

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_slope: Tensor) -> tuple[None, Tensor]:
        z, slope, inner = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, torch.addcmul(grad_h * slope, grad_slope, _PARTS[ctx.name](z)[2])
        return None, (grad_h * slope).addcmul_(_CURVATURE[ctx.name](z, inner), grad_slope)


def _gelu_forward(z: Tensor) -> tuple[Tensor, Tensor, None]:
    return F.gelu(z), torch.ops.aten.gelu_backward(torch.ones_like(z), z), None


def _gelu_curvature(z: Tensor, inner: None) -> Tensor:
    square = z.square().clamp_max_(FAR)
    density = (-0.5 * square).exp_()
    return density.mul_(square.sub_(2)).mul_(-1 / math.sqrt(2 * math.pi))


def _gelu_tanh_forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    square = z.square().clamp_max_(FAR)
    t = (square * (ROOT * CUBIC)).add_(ROOT).mul_(z).tanh_()
    rise = (t * t).sub_(1).mul_(square.mul_(-3 * ROOT * CUBIC).sub_(ROOT))
    return torch.addcmul(z, z, t).mul_(0.5), torch.addcmul(t, z, rise).add_(1).mul_(0.5), t


def _gelu_tanh_curvature(z: Tensor, t: Tensor) -> Tensor:
    """(1 − t²)(√(2/π)(1 + 6cz²) − z t u'²)."""
    square = z.square().clamp_max_(FAR)
    bend = (square * (3 * ROOT * CUBIC)).add_(ROOT).square_().mul_(z).mul_(t)
    bend.sub_(square.mul_(6 * ROOT * CUBIC)).sub_(ROOT)
    return (t * t).sub_(1).mul_(bend)


def _silu_forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = z.sigmoid()
    h = z * s
    return h, torch.addcmul(s, h, 1 - s), s  # h − hs would lose σ' where h is large


def _silu_curvature(z: Tensor, s: Tensor) -> Tensor:
    return (-2 * s).add_(1).mul_(z).add_(2).mul_(torch.addcmul(s, s, s, value=-1))


_FORWARD: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]] = {
    "gelu": _gelu_forward,
    "gelu_tanh": _gelu_tanh_forward,
    "silu": _silu_forward,
}
_CURVATURE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "gelu": _gelu_curvature,
    "gelu_tanh": _gelu_tanh_curvature,
    "silu": _silu_curvature,
}
