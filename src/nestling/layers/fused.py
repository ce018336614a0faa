"""Elementwise parts of layers, each as one step of autograd: short convolution, unit heads, gated norm, RMSNorm.

They do little work on wide tensors, so that what they read, write and keep is what they cost. Each keeps its inputs alone, makes
the rest again in the backward pass, and sums in place. A second derivative, narrow floating point (whose sums the framework's own
operations widen) and a compiler, which fuses by itself, take the formula as it stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.norm import EPS
from nestling.memory.unit import unit_rows
from nestling.memory.wanted import wanted
from nestling.native import DEFINES, call, library, plain, threads

CONVOLUTION = Path(__file__).parent / "convolution.c"
GATED_NORM = Path(__file__).parent / "gated_norm.c"
NORM_BLOCK = 64  # tokens that it takes at a time
MOST_TAPS, MOST_PARTS = 8, 4  # that the C code has room for
BLOCK = 128  # tokens of the convolution at a time, so that what one pass leaves the next finds in the cache


def convolve(x: Tensor, tail: Tensor, weight: Tensor, sources: tuple[int, ...] = (0,)) -> tuple[Tensor, ...]:
    """SiLU(Σ_j w_j ∘ x_{t−j}), in as many parts as there are sources, each `[lane, time, channel]`.

    x `[lane, time, source · channel]`, of which each part reads the channels of its source, and every source is read; tail
    `[lane, width − 1, part · channel]` before it, w `[width, part · channel]`.
    """

    def formula(x: Tensor, tail: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        stream = torch.cat([tail, spread(x, sources)], 1)
        return F.silu(_taps(stream, weight)).chunk(len(sources), -1)

    if _plain(x, tail, weight):
        return formula(x, tail, weight)
    found: tuple[Tensor, ...] = _Convolution.apply(formula, sources, x, tail, weight)  # type: ignore[no-untyped-call]
    return found


def spread(x: Tensor, sources: tuple[int, ...]) -> Tensor:
    """What the parts of `convolve` read, side by side."""
    if sources == tuple(range(len(sources))):
        return x
    read = x.chunk(max(sources) + 1, -1)
    return torch.cat([read[source] for source in sources], -1)


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
    found: Tensor = formula(*inputs) if _plain(*inputs) else function.apply(*inputs)  # type: ignore[no-untyped-call]
    return found


def _plain(*inputs: Tensor) -> bool:
    """Whether the formula is taken as it stands."""
    return torch.compiler.is_compiling() or any(x.dtype.itemsize < 4 or x.dtype != inputs[0].dtype for x in inputs)


def again(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    saved: tuple[Tensor, ...],
    grad: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated once more, of a formula with one result or several.

    To names of their own: where one input was made from another, the way through it is not to be counted here.
    """
    saved = tuple(x.view_as(x) if x.requires_grad else x for x in saved)
    found = iter(torch.autograd.grad(formula(*saved), [x for x in saved if x.requires_grad], grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in saved)


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
    def forward(
        ctx: Any,
        formula: Callable[..., tuple[Tensor, ...]],
        sources: tuple[int, ...],
        x: Tensor,
        tail: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, tail, weight)
        ctx.formula, ctx.sources = formula, sources
        lanes, time, _ = x.shape
        found = tuple(x.new_empty(lanes, time, weight.shape[1] // len(sources)) for _ in sources)
        whole = x.contiguous(), tail.contiguous(), weight.contiguous()
        if not _run_in_c(*whole, sources, y=found):
            for part, y in zip(_parts(whole, sources), found, strict=True):
                for first in range(0, time, BLOCK):
                    y[:, first : first + BLOCK] = F.silu(_block(*part, first)[1])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *again(ctx.formula, (x, tail, weight), grads)
        asked = wanted(ctx)[4]
        whole = x.contiguous(), tail.contiguous(), weight.contiguous()
        d_x, d_tail = (torch.empty_like(u) for u in whole[:2])
        d_weight = weight.new_empty(x.shape[0], *weight.shape) if asked else None  # of each lane
        grads = tuple(grad.contiguous() for grad in grads)
        if not _run_in_c(*whole, ctx.sources, of_y=grads, of_x=d_x, of_tail=d_tail, of_weight=d_weight):
            given = zip(_parts(whole, ctx.sources), grads, strict=True)
            made = _parts((d_x.zero_(), d_tail.zero_(), d_weight), ctx.sources)
            for (part, grad), own in zip(given, made, strict=True):
                _back(*part, grad, *own)
        return None, None, d_x, d_tail, None if d_weight is None else d_weight.sum(0)


class _InC(ctypes.Structure):
    """`Convolution` of convolution.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("lanes", "time", "width", "threads", "channels", "sources", "parts")),
        ("source", ctypes.c_int * MOST_PARTS),
        *((name, ctypes.c_void_p) for name in ("x", "tail", "weight")),
        *((name, ctypes.c_void_p * MOST_PARTS) for name in ("y", "of_y")),
        *((name, ctypes.c_void_p) for name in ("of_x", "of_tail", "of_weight")),
    ]


T = TypeVar("T", bound=Tensor | None)


def _parts(of: tuple[Tensor, Tensor, T], sources: tuple[int, ...]) -> list[tuple[Tensor, Tensor, T]]:
    """x, tail and weight, or their gradients, of each part of a convolution: views."""
    x, tail, weight = of
    read = x.chunk(max(sources) + 1, -1)
    tails, weights = (len(sources) * (None,) if u is None else u.chunk(len(sources), -1) for u in (tail, weight))
    return [(read[source], own, w) for source, own, w in zip(sources, tails, weights, strict=True)]  # type: ignore[misc]


def _run_in_c(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    sources: tuple[int, ...],
    y: tuple[Tensor, ...] = (),
    of_y: tuple[Tensor, ...] = (),
    **others: Tensor | None,
) -> bool:
    """The convolution by the C code, forward into y or the way back; False where it does not serve."""
    given = {"x": x, "tail": tail, "weight": weight, **{name: u for name, u in others.items() if u is not None}}
    if x.device.type != "cpu" or x.dtype not in DEFINES or weight.shape[0] > MOST_TAPS or x.numel() == 0:
        return False
    parts, together = len(sources), (*given.values(), *y, *of_y)
    code = library(CONVOLUTION, x.dtype) if parts <= MOST_PARTS else None
    if code is None or not all(u.is_contiguous() for u in together):
        return False
    lanes, time, wide = x.shape
    width, channels = weight.shape[0], weight.shape[1] // parts
    fits: dict[str, tuple[int, ...]] = {
        "tail": (lanes, width - 1, parts * channels),
        "weight": (width, parts * channels),
        "x": (lanes, time, (max(sources) + 1) * channels),
    }
    if (
        any(u.dtype != x.dtype or u.device != x.device for u in together)
        or any(given[name].shape != shape for name, shape in fits.items())
        or any(u.shape != (lanes, time, channels) for u in (*y, *of_y))
    ):
        return False  # C code would read beyond their ends; the framework says what does not fit
    c = _InC(lanes, time, width, threads(lanes * wide), channels, max(sources) + 1, parts, sources)
    for name, u in given.items():
        setattr(c, name, u.data_ptr())
    for name, several in (("y", y), ("of_y", of_y)):
        getattr(c, name)[: len(several)] = [u.data_ptr() for u in several]
    call(code, "nestling_convolution", c)
    return True


def _back(
    x: Tensor, tail: Tensor, weight: Tensor, grad: Tensor, d_x: Tensor, d_tail: Tensor, d_weight: Tensor | None
) -> None:
    """The way back through a part of the convolution; adds to gradients of x and tail, and sets those of the weights by lane."""
    halo, time = tail.shape[1], x.shape[1]
    # The gradient of the taps of a block, and behind it the first ones of the next block: a token is also a later tap.
    after = x.new_zeros(x.shape[0], halo, x.shape[2])
    scratch = x.new_empty(x.shape[0], min(BLOCK, time), x.shape[2])
    of_weight = weight.new_zeros(x.shape[0], *weight.shape)
    for first in reversed(range(0, time, BLOCK)):
        stream, z = _block(x, tail, weight, first)
        size = z.shape[1]
        taps = torch.cat([torch.ops.aten.silu_backward(grad[:, first : first + size], z), after], 1)
        part = d_x[:, first : first + size].addcmul_(taps[:, :size], weight[0])
        product = scratch[:, :size]
        for j in range(halo + 1):
            if j:
                part.addcmul_(taps[:, j : j + size], weight[j])
            torch.mul(taps[:, :size], stream[:, halo - j : halo - j + size], out=product)
            of_weight[:, j] += product.sum(1)
        after = taps[:, :halo]
    for place in range(halo):
        for j in range(halo - place, halo + 1):
            d_tail[:, place].addcmul_(after[:, place - halo + j], weight[j])
    if d_weight is not None:
        d_weight.copy_(of_weight)


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
    return call(code, "nestling_gated_norm", c) == 0


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
    return call(code, "nestling_gated_norm", _NormInC(1, 1, rows, dim, threads(rows), epsilon, *at, *ends)) == 0


def _heads(x: Tensor, y: Tensor) -> Tensor:
    """x `[lane, time, head · dim]` → `[lane, time, head, dim]`, with the heads of y."""
    return x.reshape(*x.shape[:2], y.shape[1], y.shape[3])


def _normed(y: Tensor) -> tuple[Tensor, Tensor]:
    """y / √(mean y² + ε), and the factor."""
    scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1]).add_(EPS).rsqrt_()
    return y * scale, scale
