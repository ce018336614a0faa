"""Several linear maps of one input whose weights stand in one matrix, as of queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import nn


class Joined(nn.Linear):
    """`nn.Linear` whose outputs are those of `parts` maps of equal width, one after the other.

    It computes what a linear layer computes; to `Muon` and `M3` its weight is `parts` matrices, each orthogonalized by itself
    (our default, the papers are silent). Raises ValueError where the outputs do not divide.
    """

    def __init__(self, in_features: int, out_features: int, *, parts: int, **settings: Any) -> None:
        if parts < 1 or out_features % parts:
            raise ValueError(f"Joined: {out_features} outputs in {parts} parts; expected parts of equal width")
        super().__init__(in_features, out_features, **settings)
        self.parts = parts

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={self.parts}"
