"""Elementwise parts of layers, each as one step of autograd: short convolution, unit heads, gated norm, RMSNorm.

They do little work on wide tensors, so that what they read, write and keep is what they cost. Each keeps its inputs alone, makes
the rest again in the backward pass, and sums in place. A second derivative, narrow floating point (whose sums the framework's own
operations widen) and a compiler, which fuses by itself, take the formula as it stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.norm import EPS
from nestling.memory.unit import unit_rows
from nestling.memory.wanted import wanted
from nestling.native import DEFINES, library, plain, threads

CONVOLUTION = Path(__file__).parent / "convolution.c"
GATED_NORM = Path(__file__).parent / "gated_norm.c"
NORM_BLOCK = 64  # tokens that it takes at a time
MOST_TAPS = 8  # that the C code has room for
BLOCK = 128  # tokens of the convolution at a time, so that what one pass leaves the next finds in the cache


def convolve(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    """SiLU(Σ_j w_j ∘ x_{t−j}): x `[lane, time, channel]`, tail `[lane, width − 1, channel]` before it, w `[width, channel]`."""
    return _call(_Convolution, _convolve, x, tail, weight)


def unit_heads(x: Tensor) -> Tensor:
    """x `[lane, time, head, dim]` → x / √(‖x‖² + ε²) as `[lane, head, time, dim]`."""
    return unit_rows(x.transpose(1, 2))


def gated_norm(y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm(y) ∘ SiLU(g): y `[lane, head, time, dim]`, g `[lane, time, head · dim]` → `[lane, time, head · dim]`."""
    return _call(_GatedNorm, _gated_norm, y, weight, gate)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x ∘ w / √(mean x² + ε) along the last dimension, w `[dim]`."""
    served = x.device.type == "cpu" and x.dtype in DEFINES and x.dtype == weight.dtype and x.numel() > 0
    if plain(x, weight) or not served or library(GATED_NORM, x.dtype) is None:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    y: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


def _call(function: type[torch.autograd.Function], formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    plain = torch.compiler.is_compiling() or any(x.dtype.itemsize < 4 or x.dtype != inputs[0].dtype for x in inputs)
    found: Tensor = formula(*inputs) if plain else function.apply(*inputs)  # type: ignore[no-untyped-call]
    return found


def again(formula: Callable[..., Tensor], saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated once more.

    To names of their own: where one input was made from another, the way through it is not to be counted here.
    """
    saved = tuple(x.view_as(x) if x.requires_grad else x for x in saved)
    found = iter(torch.autograd.grad(formula(*saved), [x for x in saved if x.requires_grad], grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in saved)


def _convolve(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    return F.silu(_taps(torch.cat([tail, x], 1), weight))


def _taps(stream: Tensor, weight: Tensor) -> Tensor:
    halo = weight.shape[0] - 1
    time = stream.shape[1] - halo
    y = stream[:, halo:] * weight[0]
    for j in range(1, halo + 1):
        y = torch.addcmul(y, stream[:, halo - j : halo - j + time], weight[j])
    return y


def _gated_norm(y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    y = F.rms_norm(y, y.shape[-1:], weight.to(y.dtype), EPS)
    return y.transpose(1, 2).flatten(2).to(gate.dtype) * F.silu(gate)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, tail, weight)
        y = torch.empty_like(x)
        if _run_in_c(x.contiguous(), tail.contiguous(), weight.contiguous(), y=y):
            return y
        for first in range(0, x.shape[1], BLOCK):
            z = _block(x, tail, weight, first)[1]
            torch.ops.aten.silu.out(z, out=y[:, first : first + BLOCK])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(_convolve, (x, tail, weight), grad)
        halo, time = tail.shape[1], x.shape[1]
        d_x, d_tail, d_weight = torch.empty_like(x), torch.zeros_like(tail), torch.zeros_like(weight)
        whole = x.contiguous(), tail.contiguous(), weight.contiguous()
        per_lane = weight.new_empty(x.shape[0], *weight.shape) if wanted(ctx)[2] else None
        if _run_in_c(*whole, of_y=grad.contiguous(), of_x=d_x, of_tail=d_tail, of_weight=per_lane):
            return d_x, d_tail, None if per_lane is None else per_lane.sum(0)
        # The gradient of the taps of a block, and behind it the first ones of the next block: a token is also a later tap.
        after = x.new_zeros(x.shape[0], halo, x.shape[2])
        scratch = x.new_empty(x.shape[0], min(BLOCK, time), x.shape[2])
        for first in reversed(range(0, time, BLOCK)):
            stream, z = _block(x, tail, weight, first)
            size = z.shape[1]
            taps = torch.cat([torch.ops.aten.silu_backward(grad[:, first : first + size], z), after], 1)
            part = torch.mul(taps[:, :size], weight[0], out=d_x[:, first : first + size])
            product = scratch[:, :size]
            for j in range(halo + 1):
                if j:
                    part.addcmul_(taps[:, j : j + size], weight[j])
                torch.mul(taps[:, :size], stream[:, halo - j : halo - j + size], out=product)
                d_weight[j] += product.sum((0, 1))
            after = taps[:, :halo]
        for place in range(halo):
            for j in range(halo - place, halo + 1):
                d_tail[:, place].addcmul_(after[:, place - halo + j], weight[j])
        return d_x, d_tail, d_weight


class _InC(ctypes.Structure):
    """`Convolution` of convolution.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("lanes", "time", "channels", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "tail", "weight", "y", "of_y", "of_x", "of_tail", "of_weight")),
    ]


def _run_in_c(x: Tensor, tail: Tensor, weight: Tensor, **others: Tensor | None) -> bool:
    """The convolution by the C code; False where it does not serve."""
    given = {"x": x, "tail": tail, "weight": weight, **{name: u for name, u in others.items() if u is not None}}
    if x.device.type != "cpu" or x.dtype not in DEFINES or weight.shape[0] > MOST_TAPS or x.numel() == 0:
        return False
    code = library(CONVOLUTION, x.dtype)
    if code is None or not all(u.is_contiguous() for u in given.values()):
        return False
    lanes, time, channels = x.shape
    fits = {"tail": (lanes, weight.shape[0] - 1, channels), "weight": (weight.shape[0], channels), "of_y": x.shape}
    if any(
        u.dtype != x.dtype or u.device != x.device or tuple(u.shape) != tuple(fits.get(name, u.shape))
        for name, u in given.items()
    ):
        return False  # C code would read beyond their ends; the framework says what does not fit
    c = _InC(lanes, time, channels, weight.shape[0], threads(lanes * channels))
    for name, u in given.items():
        setattr(c, name, u.data_ptr())
    code.nestling_convolution(ctypes.byref(c))
    return True


def _block(x: Tensor, tail: Tensor, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """A block of tokens with those before it, and its sum of taps."""
    halo = tail.shape[1]
    before = tail if first == 0 else x[:, first - halo : first]
    stream = torch.cat([before, x[:, first : first + BLOCK]], 1)
    size = stream.shape[1] - halo
    z = stream[:, halo:] * weight[0]
    for j in range(1, halo + 1):
        z.addcmul_(stream[:, halo - j : halo - j + size], weight[j])
    return stream, z


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight, gate)
        z = torch.empty_like(gate, memory_format=torch.contiguous_format)
        if _norm_in_c(y, weight, gate, z=z):
            return z
        z = F.silu(gate)
        heads = _heads(z, y)
        heads.mul_(_normed(y)[0].transpose(1, 2)).mul_(weight)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(_gated_norm, (y, weight, gate), grad)
        d_y, d_gate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, gate))
        parts = weight.new_empty(y.shape[0] * -(-y.shape[2] // NORM_BLOCK), y.shape[3])
        if _norm_in_c(y, weight, gate, of_z=grad, of_y=d_y, of_weight=parts, of_gate=d_gate):
            return d_y, parts.sum(0), d_gate
        normed, scale = _normed(y)
        normed = normed.transpose(1, 2)
        d_normed = _heads(F.silu(gate) * grad, y)
        product = d_normed * normed
        d_weight = product.sum((0, 1, 2)) if wanted(ctx)[1] else None
        along = product.mul_(weight).mean(-1, keepdim=True)
        d_normed.mul_(weight).addcmul_(normed, along, value=-1).mul_(scale.transpose(1, 2))
        d_silu = torch.mul(_heads(grad, y), normed, out=product).mul_(weight).flatten(2)
        return d_normed.transpose(1, 2), d_weight, torch.ops.aten.silu_backward(d_silu, gate)


class _RMSNorm(torch.autograd.Function):
    """By the C code alone: it is that of the gated norm, without a gate, of one head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        z = torch.empty_like(x, memory_format=torch.contiguous_format)
        return z if _rms_in_c(x, weight, epsilon, z=z) else F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        epsilon: float = ctx.epsilon

        def formula(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, weight.shape, weight, epsilon)

        if torch.is_grad_enabled():
            return *again(formula, (x, weight), grad), None
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        blocks = -(-x.numel() // (x.shape[-1] * NORM_BLOCK))
        parts = weight.new_empty(blocks, x.shape[-1]) if wanted(ctx)[1] else None
        if not _rms_in_c(x, weight, epsilon, of_z=grad, of_x=d_x, of_weight=parts):
            with torch.enable_grad():
                found = again(formula, (x, weight), grad)
            return *(None if g is None else g.detach() for g in found), None
        return d_x, None if parts is None else parts[0] if blocks == 1 else parts.sum(0), None


class _NormInC(ctypes.Structure):
    """`Gated` of gated_norm.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("lanes", "heads", "time", "dim", "threads")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("y", "weight", "gate", "z", "of_z", "of_y", "of_weight", "of_gate")),
    ]


def _norm_in_c(y: Tensor, weight: Tensor, gate: Tensor | None, epsilon: float = EPS, **others: Tensor | None) -> bool:
    """The gated norm by the C code, forward or, with of_z and others, backward; False where it does not serve."""
    named = {"y": y, "weight": weight, "gate": gate, **others}
    given = {name: u for name, u in named.items() if u is not None}
    if y.device.type != "cpu" or y.dtype not in DEFINES or y.numel() == 0:
        return False
    code = library(GATED_NORM, y.dtype)
    lanes, heads, time, dim = y.shape
    wide = (lanes, time, heads * dim)
    fits = {"weight": (dim,), "gate": wide, "of_z": wide}
    if code is None or any(
        u.dtype != y.dtype or u.device != y.device or u.shape != fits.get(name, u.shape) for name, u in given.items()
    ):
        return False
    c = _NormInC(lanes, heads, time, dim, threads(lanes * time), epsilon)
    whole = {name: u.resolve_neg().contiguous() for name, u in given.items()}  # what is written to is so already
    for name, u in whole.items():
        setattr(c, name, u.data_ptr())
    failed: int = code.nestling_gated_norm(ctypes.byref(c))
    return failed == 0


def _rms_in_c(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    z: Tensor | None = None,
    of_z: Tensor | None = None,
    of_x: Tensor | None = None,
    of_weight: Tensor | None = None,
) -> bool:
    """RMSNorm by the C code, forward or, with of_z and others, backward; False where it does not serve. It is short, as norms are
    many and small where a call has few tokens. What is written to lies in one piece."""
    code = library(GATED_NORM, x.dtype)
    dim = x.shape[-1]
    given = [x, weight] if of_z is None else [x, weight, of_z]
    if code is None or weight.shape != (dim,) or any(u.dtype != x.dtype or u.device.type != "cpu" for u in given):
        return False
    if of_z is not None and of_z.shape != x.shape:
        return False
    given = [u if u.is_contiguous() and not u.is_neg() else u.resolve_neg().contiguous() for u in given]
    rows = x.numel() // dim
    at = [None if u is None else u.data_ptr() for u in (*given[:2], None, z, given[2] if len(given) > 2 else None)]
    ends = (None if u is None else u.data_ptr() for u in (of_x, of_weight, None))
    failed: int = code.nestling_gated_norm(ctypes.byref(_NormInC(1, 1, rows, dim, threads(rows), epsilon, *at, *ends)))
    return failed == 0


def _heads(x: Tensor, y: Tensor) -> Tensor:
    """x `[lane, time, head · dim]` → `[lane, time, head, dim]`, with the heads of y."""
    return x.reshape(*x.shape[:2], y.shape[1], y.shape[3])


def _normed(y: Tensor) -> tuple[Tensor, Tensor]:
    """y / √(mean y² + ε), and the factor."""
    scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1]).add_(EPS).rsqrt_()
    return y * scale, scale
