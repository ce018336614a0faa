"""Random inputs of a memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draw(NamedTuple):
    """Random tensors `[lane, head, time, …]` in float64, one after the other from a generator."""

    generator: torch.Generator
    lanes: int
    heads: int
    time: int

    def normal(self, *last: int) -> Tensor:
        """Standard normal."""
        shape = (self.lanes, self.heads, self.time, *last)
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, dim: int) -> Tensor:
        """Directions, of unit norm."""
        return F.normalize(self.normal(dim), dim=-1)

    def share(self, *last: int, shift: float = 0.0) -> Tensor:
        """Between 0 and 1, about a half; nearer to 1 with a larger shift."""
        return torch.sigmoid(self.normal(*last) + shift)
