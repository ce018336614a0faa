"""SwiGLU, the channel mixer: (SiLU(x W_g) ∘ x W_u) W_d."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated feed-forward network without biases; has no state."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[…, dim]` → `[…, dim]`."""
        gate, value = self.up(x).chunk(2, -1)
        down: Tensor = self.down(F.silu(gate) * value)
        return down
