"""SwiGLU, the channel mixer: (SiLU(x W_g) ∘ x W_u) W_d."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.fused import again
from nestling.layers.low_rank import Kept, LowRank, Whole, used
from nestling.memory.wanted import wanted
from nestling.native import DEFINES, call, library, plain, threads
from nestling.optim.joined import Joined

SOURCE = Path(__file__).parent / "swiglu.c"


class SwiGLU(nn.Module):
    """Gated feed-forward network without biases. Its weights may be moved per lane; see `forward`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Joined(dim, 2 * hidden, parts=2, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, moved: Sequence[Kept | Whole] = ()) -> Tensor:
        """x `[…, dim]` → `[…, dim]`.

        moved: what each lane adds to the weights (up `[lane, 2·hidden, dim]`, down `[lane, dim, hidden]`, in full or as
        products of low rank), or what it uses instead, x being `[lane, time, dim]`; empty: the weights as they are. Moved
        weights act in the precision of what moved them.
        """
        if not moved:
            down: Tensor = self.down(_hidden(self.up(x)))
            return down
        with torch.autocast(x.device.type, enabled=False):  # in less than float32 small moves would vanish in the sum
            up, out = moved
            if not (isinstance(up, LowRank) or isinstance(out, LowRank) or plain(x, self.up.weight)):
                u, d = used(self.up.weight, up), used(self.down.weight, out)
                if x.dim() == 3 and u.dtype == d.dtype:
                    y: Tensor = _Moved.apply(x.to(u.dtype), u, d)  # type: ignore[no-untyped-call]
                    return y.to(x.dtype)
            gate, value = _apply(x, self.up.weight, up).chunk(2, -1)
            return _apply(F.silu(gate) * value, self.down.weight, out).to(x.dtype)


class _Moved(torch.autograd.Function):
    """`_moved` in one step: what lies between the products is made again on the way back, in one pass. The weights' gradients lie
    in memory as these do; the framework's are transposed, and all that a level does with them would go across the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        z = x @ up.mT
        ctx.save_for_backward(x, up, down, z)
        return _gated(z) @ down.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(_moved, (x, up, down), grad)
        of_x, of_up, of_down = wanted(ctx)
        h, of_z = _back_gated(z, grad @ down)
        return of_z @ up if of_x else None, of_z.mT @ x if of_up else None, grad.mT @ h if of_down else None


def _moved(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x `[lane, time, dim]`, up `[lane, 2·hidden, dim]`, down `[lane, dim, hidden]`."""
    return _formula(x @ up.mT) @ down.mT


def _hidden(z: Tensor) -> Tensor:
    """SiLU(a) ∘ b of z = [a | b], bit for bit as `_Moved` has it."""
    if plain(z) or z.dtype not in DEFINES:
        return _formula(z)
    h: Tensor = _Hidden.apply(z)  # type: ignore[no-untyped-call]
    return h


def _formula(z: Tensor) -> Tensor:
    gate, value = z.chunk(2, -1)
    return F.silu(gate) * value


class _Hidden(torch.autograd.Function):
    """`_formula` in one step."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return _gated(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return again(_formula, (z,), grad) if torch.is_grad_enabled() else (_back_gated(z, grad.contiguous())[1],)


def _gated(z: Tensor) -> Tensor:
    h = z.new_empty(*z.shape[:-1], z.shape[-1] // 2)
    return h if _run_in_c(z, h) else _formula(z)


def _back_gated(z: Tensor, of_h: Tensor) -> tuple[Tensor, Tensor]:
    """`_gated` again, and the gradient of z."""
    gate, value = z.chunk(2, -1)
    h, of_z = torch.empty_like(of_h), torch.empty_like(z)
    if _run_in_c(z, h, of_h=of_h, of_z=of_z):
        return h, of_z
    active = F.silu(gate)
    of_gate = torch.ops.aten.silu_backward(of_h * value, gate)
    return active * value, torch.cat([of_gate, of_h * active], -1)


class _InC(ctypes.Structure):
    """`Gate` of swiglu.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("z", "h", "of_h", "of_z")),
    ]


def _run_in_c(z: Tensor, h: Tensor, **others: Tensor) -> bool:
    """Forward or, with of_h and of_z, backward by the C code; False where it does not serve."""
    given = {"z": z, "h": h, **others}
    if z.device.type != "cpu" or z.dtype not in DEFINES or z.numel() == 0:
        return False
    code = library(SOURCE, z.dtype)
    if code is None or not all(u.dtype == z.dtype and u.is_contiguous() and not u.is_neg() for u in given.values()):
        return False
    width, rows = h.shape[-1], h.numel() // h.shape[-1]
    c = _InC(rows, width, threads(rows), **{name: u.data_ptr() for name, u in given.items()})
    return call(code, "nestling_swiglu", c) == 0


def _apply(x: Tensor, weight: Tensor, moved: Kept | Whole) -> Tensor:
    """x (W + Δ)ᵀ."""
    if not isinstance(moved, LowRank):
        w = used(weight, moved)
        return x.to(w.dtype) @ w.mT
    x = x.to(torch.promote_types(x.dtype, moved.left.dtype))
    return F.linear(x, weight.to(x.dtype)) + (x @ moved.right.mT) @ moved.left.mT
