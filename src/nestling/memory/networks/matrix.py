"""M(x) = x W, the linear memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.networks.base import Linear, Network, Trace
from nestling.memory.settings import numbers, switches


@dataclass(frozen=True)
class Matrix(Network):
    """M(x) = x W, W `[head, key_dim, value_dim]`.

    init_scale: standard deviation of the initial entries times √key_dim; 0, the default, is the empty memory of the classics.
    identity: add the identity to the initial weights: for memories that generate values for themselves, as an empty one
        would generate 0 for ever (needs key_dim = value_dim).
    """

    init_scale: float = 0.0
    identity: bool = False

    def __post_init__(self) -> None:
        numbers(self, least=0, init_scale=self.init_scale)
        switches(self, identity=self.identity)

    def __str__(self) -> str:
        return "matrix, at first " + ("the identity" if self.identity else "random" if self.init_scale else "0")

    @property
    def depth(self) -> int:
        return 1

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.identity and key_dim != value_dim:
            raise ValueError(f"Matrix(identity=True) is square, but key_dim is {key_dim} and value_dim {value_dim}")
        return ((key_dim, value_dim),)

    def init(
        self, shapes: Sequence[tuple[int, int]], heads: int, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        ((key_dim, value_dim),) = shapes
        w = torch.zeros(heads, key_dim, value_dim)
        if self.init_scale:
            w = torch.randn(heads, key_dim, value_dim, generator=generator) * (self.init_scale * key_dim**-0.5)
        return (w + torch.eye(key_dim) if self.identity else w,)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return linear(0, x)

    def trace(self, weights: Sequence[Tensor], k: Tensor) -> Trace:
        prediction = k @ weights[0]
        return Trace((k,), (prediction,), prediction, ())

    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        return (error,)
