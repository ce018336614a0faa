"""SwiGLU, the channel mixer: (SiLU(x W_g) ∘ x W_u) W_d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.low_rank import Kept, LowRank, Whole, used
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


def _apply(x: Tensor, weight: Tensor, moved: Kept | Whole) -> Tensor:
    """x (W + Δ)ᵀ."""
    if not isinstance(moved, LowRank):
        w = used(weight, moved)
        return x.to(w.dtype) @ w.mT
    x = x.to(torch.promote_types(x.dtype, moved.left.dtype))
    return F.linear(x, weight.to(x.dtype)) + (x @ moved.right.mT) @ moved.left.mT
