"""SwiGLU, the channel mixer: (SiLU(x W_g) ∘ x W_u) W_d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.low_rank import Kept, LowRank, Whole, used
from nestling.memory.wanted import wanted
from nestling.optim.joined import Joined


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
            gate, value = self.up(x).chunk(2, -1)
            down: Tensor = self.down(F.silu(gate) * value)
            return down
        with torch.autocast(x.device.type, enabled=False):  # in less than float32 small moves would vanish in the sum
            up, out = moved
            gate, value = _apply(x, self.up.weight, up).chunk(2, -1)
            return _apply(F.silu(gate) * value, self.down.weight, out).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, W `[lane, out, in]`. The gradient of W lies in memory as W does; the framework's is transposed, and all that a level
    does with it would go across the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        of_x, of_w = wanted(ctx)
        return grad @ w if of_x else None, grad.mT @ x if of_w else None


def _apply(x: Tensor, weight: Tensor, moved: Kept | Whole) -> Tensor:
    """x (W + Δ)ᵀ."""
    if not isinstance(moved, LowRank):
        w = used(weight, moved)
        x = x.to(w.dtype)
        plain = torch.compiler.is_compiling() or x.dim() != 3
        return x @ w.mT if plain else _Product.apply(x, w)  # type: ignore[no-untyped-call]
    x = x.to(torch.promote_types(x.dtype, moved.left.dtype))
    return F.linear(x, weight.to(x.dtype)) + (x @ moved.right.mT) @ moved.left.mT
