"""Rows of unit norm as one step of autograd, whose backward pass reads the rows it made and their scale, nothing else."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nestling.memory.norm import EPS, l2_norm
from nestling.native import DEFINES, HEADERS, call, library, threads

SOURCE = HEADERS / "unit.c"


def unit_rows(x: Tensor) -> Tensor:
    """x / √(‖x‖² + ε²) along the last dimension of four, whatever the order of the others; the rows lie in order."""
    if torch.compiler.is_compiling() or x.dtype.itemsize < 4:
        return l2_norm(x)
    y: Tensor = _UnitRows.apply(x)[0]  # type: ignore[no-untyped-call]
    return y


class _UnitRows(torch.autograd.Function):
    """The scale is an output as well, so that what the backward pass reads is known to a second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, scale = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1)
        if not _run_in_c(x, y, scale):
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(EPS**2).rsqrt_().contiguous()
            torch.mul(x, scale, out=y)
        ctx.save_for_backward(y, scale)
        # The gradient has x's order in memory, so that nobody has to turn it.
        ctx.turned = x.dim() == 4 and x.stride(1) < x.stride(2)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> Tensor | None:
        y, scale = ctx.saved_tensors
        d_x = None
        if grad is not None:
            made = None if torch.is_grad_enabled() else _room(y, ctx.turned)
            if made is not None and _run_in_c(made, y, scale, of_y=grad.resolve_neg().contiguous(), of_x=made):
                d_x = made
            else:
                d_x = torch.addcmul(grad, y, (grad * y).sum(-1, keepdim=True), value=-1)
                d_x = d_x * scale if torch.is_grad_enabled() else d_x.mul_(scale)
        if grad_scale is not None:  # in a second backward pass only
            more = -grad_scale * y * scale.square()
            d_x = more if d_x is None else d_x + more
        return d_x


def _room(y: Tensor, turned: bool) -> Tensor:
    """Like y, or with its two middle dimensions the other way round in memory."""
    if not turned:
        return torch.empty_like(y)
    lanes, heads, time, dim = y.shape
    return y.new_empty(lanes, time, heads, dim).transpose(1, 2)


class _InC(ctypes.Structure):
    """`Unit` of unit.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("lanes", "heads", "time", "dim", "threads")),
        *((name, ctypes.c_ssize_t) for name in ("lane", "head", "token")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "y", "scale", "of_y", "of_x")),
    ]


def _run_in_c(x: Tensor, y: Tensor, scale: Tensor, **others: Tensor) -> bool:
    """Forward or, with of_y and of_x, backward by the C code, of_x in the place of x; False where it does not serve."""
    given = {"y": y, "scale": scale, **others}
    if (
        x.device.type != "cpu"
        or x.dtype not in DEFINES
        or x.dim() != 4
        or x.numel() == 0
        or x.stride(-1) != 1
        or x.is_neg()
    ):
        return False
    code = library(SOURCE, x.dtype)
    if code is None or any(
        u.dtype != x.dtype or u.device != x.device or not (u is x or u.is_contiguous()) for u in given.values()
    ):
        return False
    c = _InC(*x.shape, threads(x.shape[0] * x.shape[2]), *x.stride()[:3], EPS, x.data_ptr())
    for name, u in given.items():
        setattr(c, name, u.data_ptr())
    return call(code, "nestling_unit", c) == 0
