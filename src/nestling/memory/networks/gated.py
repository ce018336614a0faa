"""M(x) = x + LN((σ(xW_2) ∘ xW_3) W_1), the gated memory (Atlas, eq. 43; the norm as in its appendix E)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.networks.activation import NAMES, activate, activate_with_slope
from nestling.memory.networks.base import Linear, Network, Trace
from nestling.memory.networks.layer_norm import EPS, back, normalize
from nestling.memory.networks.mlp import widths, words
from nestling.memory.settings import numbers, switches


@dataclass(frozen=True)
class GatedMLP(Network):
    """A gated perceptron of one hidden layer without biases; its weights in order: W_2, W_3, W_1.

    expansion, activation, residual, leading, norm, init_scale as in `MLP`
    """

    expansion: float = 4.0
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    residual: bool = True
    leading: bool = False
    norm: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        numbers(self, above=0, expansion=self.expansion)
        numbers(self, least=0, init_scale=self.init_scale)
        switches(self, residual=self.residual, leading=self.leading, norm=self.norm)
        if self.activation not in NAMES:
            raise ValueError(f"GatedMLP.activation is {self.activation!r}; expected one of: {', '.join(NAMES)}")

    def __str__(self) -> str:
        return words(f"gated MLP, {self.expansion:g}× wide", self)

    @property
    def depth(self) -> int:
        return 3

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        hidden = widths(
            "GatedMLP", key_dim, value_dim, expansion=self.expansion, residual=self.residual, leading=self.leading
        )
        return (key_dim, hidden), (key_dim, hidden), (hidden, value_dim)

    def init(
        self, shapes: Sequence[tuple[int, int]], heads: int, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        return tuple(torch.randn(heads, i, o, generator=generator) * (self.init_scale * i**-0.5) for i, o in shapes)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        z = linear(2, activate(self.activation, linear(0, x)) * linear(1, x))
        if self.norm:
            z = F.layer_norm(z, z.shape[-1:], eps=EPS)
        return x[..., : z.shape[-1]] + z if self.residual else z

    def trace(self, weights: Sequence[Tensor], k: Tensor) -> Trace:
        gate, other = k @ weights[0], k @ weights[1]
        open_, slope = activate_with_slope(self.activation, gate)
        h = open_ * other
        z = h @ weights[2]
        products = (gate, other, z)
        saved: tuple[Tensor, ...] = (open_, slope, other)
        if self.norm:
            z, scale = normalize(z)
            saved = (*saved, z, scale)
        prediction = k[..., : z.shape[-1]] + z if self.residual else z
        return Trace((k, k, h), products, prediction, saved)

    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        open_, slope, other = trace.saved[:3]
        if self.norm:
            error = back(error, *trace.saved[3:])
        before = error @ weights[2].mT
        return before * other * slope, before * open_, error
