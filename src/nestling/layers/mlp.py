"""SwiGLU, the channel mixer: (SiLU(x W_g) ∘ x W_u) W_d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated feed-forward network without biases. Its weights may be moved per lane; see `forward`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, moved: tuple[Tensor, ...] = ()) -> Tensor:
        """x `[…, dim]` → `[…, dim]`.

        moved: what each lane adds to the weights (up `[lane, 2·hidden, dim]`, down `[lane, dim, hidden]`), x being
        `[lane, time, dim]`; empty: the weights as they are. Moved weights act in the precision of what moved them.
        """
        if not moved:
            gate, value = self.up(x).chunk(2, -1)
            down: Tensor = self.down(F.silu(gate) * value)
            return down
        with torch.autocast(x.device.type, enabled=False):  # in less than float32 small moves would vanish in the sum
            up, out = (w + d for w, d in zip((self.up.weight, self.down.weight), moved, strict=True))
            gate, value = (x.to(up.dtype) @ up.mT).chunk(2, -1)
            return ((F.silu(gate) * value) @ out.mT).to(x.dtype)
