"""M(x) = x + LN(σ(… σ(x W_1) …) W_n), the deep memory (Miras, §5.3: two layers, expansion 4, GELU, residual, layer norm).

Every part is a setting: depth, expansion, activation, residual, norm. Depth 1 with residual and norm is TTT-Linear's map.
The layer norm has gain 1 and shift 0. A value stands for a shift as v − shift, and for a gain γ as x + (v − x)/γ, but then every
coordinate of the loss would weigh γ² as well, which no value can make up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.networks.activation import NAMES, activate, activate_with_slope
from nestling.memory.networks.base import Linear, Network, Trace
from nestling.memory.networks.layer_norm import EPS, back, normalize
from nestling.memory.settings import numbers, switches, whole_numbers


@dataclass(frozen=True)
class MLP(Network):
    """A multi-layer perceptron without biases.

    depth        number of weight matrices, at least 1
    expansion    hidden width as a multiple of key_dim (leading: of value_dim)
    activation   "gelu" (exact), "gelu_tanh" (the approximation of the TTT code) or "silu"
    residual     add the input to the output; needs key_dim = value_dim, or:
    leading      the residual adds the first value_dim inputs alone: those of a feature map that are the key itself
    norm         layer norm (no affine part) of the last layer's output, before the residual
    init_scale   standard deviation of initial entries times √in
    last_std     standard deviation of the last layer's initial entries; None: as the others. Small with a residual: M(x) ≈ x
    """

    depth: int = 2
    expansion: float = 4.0
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    residual: bool = True
    leading: bool = False
    norm: bool = True
    init_scale: float = 1.0
    last_std: float | None = None

    def __post_init__(self) -> None:
        whole_numbers(self, depth=self.depth)
        numbers(self, above=0, expansion=self.expansion)
        numbers(self, least=0, init_scale=self.init_scale)
        switches(self, residual=self.residual, leading=self.leading, norm=self.norm)
        if self.last_std is not None:
            numbers(self, least=0, last_std=self.last_std)
        if self.activation not in NAMES:
            raise ValueError(f"MLP.activation is {self.activation!r}; expected one of: {', '.join(NAMES)}")

    def __str__(self) -> str:
        wide = f", {self.expansion:g}× wide" if self.depth > 1 else ""
        return words(f"MLP of {self.depth} layer{'s' if self.depth > 1 else ''}{wide}", self)

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        hidden = widths(
            "MLP", key_dim, value_dim, expansion=self.expansion, residual=self.residual, leading=self.leading
        )
        return tuple(pairwise([key_dim, *[hidden] * (self.depth - 1), value_dim]))

    def init(
        self, shapes: Sequence[tuple[int, int]], heads: int, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        scales = [self.init_scale * i**-0.5 for i, _ in shapes]
        if self.last_std is not None:
            scales[-1] = self.last_std
        return tuple(
            torch.randn(heads, i, o, generator=generator) * scale for (i, o), scale in zip(shapes, scales, strict=True)
        )

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        h = x
        for layer in range(self.depth - 1):
            h = activate(self.activation, linear(layer, h))
        z = linear(self.depth - 1, h)
        if self.norm:
            z = F.layer_norm(z, z.shape[-1:], eps=EPS)
        return _passed(x, z) + z if self.residual else z

    def trace(self, weights: Sequence[Tensor], k: Tensor) -> Trace:
        inputs, slopes = [k], []
        products: list[Tensor] = []
        for layer in range(self.depth - 1):
            products.append(inputs[-1] @ weights[layer])
            h, slope = activate_with_slope(self.activation, products[-1])
            inputs.append(h)
            slopes.append(slope)
        z = inputs[-1] @ weights[-1]
        products.append(z)
        saved = tuple(slopes)
        if self.norm:
            z, scale = normalize(z)
            saved = (*saved, z, scale)
        return Trace(tuple(inputs), tuple(products), _passed(k, z) + z if self.residual else z, saved)

    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        slopes = trace.saved[: self.depth - 1]
        if self.norm:
            error = back(error, *trace.saved[self.depth - 1 :])
        errors = [error]
        for layer in range(self.depth - 1, 0, -1):
            errors.append((errors[-1] @ weights[layer].mT) * slopes[layer - 1])
        return tuple(reversed(errors))


def words(head: str, network: Any) -> str:
    """A perceptron in words: `head`, its activation, and what is added to its output."""
    parts = [head, *([network.activation.upper().replace("_TANH", " (tanh)")] if network.depth > 1 else [])]
    if network.residual:
        parts.append("residual of the features' linear part" if network.leading else "residual")
    return ", ".join([*parts, *(["layer norm"] if network.norm else [])])


def widths(name: str, key_dim: int, value_dim: int, *, expansion: float, residual: bool, leading: bool) -> int:
    """The hidden width of a perceptron, or ValueError for dimensions that it cannot join."""
    if residual and not leading and key_dim != value_dim:
        raise ValueError(
            f"{name}(residual=True) adds its input to its output, but key_dim is {key_dim} and value_dim {value_dim}: "
            "make them equal, or set residual=False (with a feature map: leading=True)"
        )
    if residual and key_dim < value_dim:
        raise ValueError(f"{name}(leading=True) has {key_dim} inputs, fewer than value_dim {value_dim}")
    hidden = round((value_dim if leading else key_dim) * expansion)
    if hidden < 1:
        raise ValueError(f"{name}.expansion {expansion} of key_dim {key_dim} gives no hidden unit: raise it")
    return hidden


def _passed(x: Tensor, z: Tensor) -> Tensor:
    """What a residual adds to z."""
    return x if x.shape[-1] == z.shape[-1] else x[..., : z.shape[-1]]
