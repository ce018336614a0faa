"""M(x) = x + LN(σ(… σ(x W_1) …) W_n), the deep memory (Miras, §5.3: two layers, expansion 4, GELU, residual, layer norm).

Every part is a setting: depth, expansion, activation, residual, norm. Depth 1 with residual and norm is TTT-Linear's map.
The layer norm has no gain and shift of its own here: values are a learned projection, which can take both up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.networks.activation import NAMES, activate, activate_with_slope
from nestling.memory.networks.base import Linear, Trace

EPS = 1e-6  # inside the layer norm's root


@dataclass(frozen=True)
class MLP:
    """A multi-layer perceptron without biases.

    depth        number of weight matrices, at least 1
    expansion    hidden width as a multiple of key_dim
    activation   "gelu" (exact), "gelu_tanh" (the approximation of the TTT code) or "silu"
    residual     add the input to the output; needs key_dim = value_dim
    norm         layer norm (no affine part) of the last layer's output, before the residual
    init_scale   standard deviation of initial entries times √in
    last_std     standard deviation of the last layer's initial entries; None: as the others. Small with a residual: M(x) ≈ x
    """

    depth: int = 2
    expansion: float = 4.0
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    residual: bool = True
    norm: bool = True
    init_scale: float = 1.0
    last_std: float | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"MLP.depth is {self.depth}; expected at least 1 weight matrix")
        if self.activation not in NAMES:
            raise ValueError(f"MLP.activation is {self.activation!r}; expected one of: {', '.join(NAMES)}")

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.residual and key_dim != value_dim:
            raise ValueError(
                f"MLP(residual=True) adds its input to its output, but key_dim is {key_dim} and value_dim {value_dim}: "
                "make them equal, or set residual=False"
            )
        hidden = round(key_dim * self.expansion)
        if hidden < 1:
            raise ValueError(f"MLP.expansion {self.expansion} of key_dim {key_dim} gives no hidden unit: raise it")
        widths = [key_dim, *[hidden] * (self.depth - 1), value_dim]
        return tuple(pairwise(widths))

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
        return x + z if self.residual else z

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
            centered = z - z.mean(-1, keepdim=True)
            scale = (centered.square().mean(-1, keepdim=True) + EPS).rsqrt()
            z = centered * scale
            saved = (*saved, z, scale)
        return Trace(tuple(inputs), tuple(products), k + z if self.residual else z, saved)

    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        slopes = trace.saved[: self.depth - 1]
        if self.norm:  # backward of the layer norm: remove the parts along 1 and along the normalized output
            normed, scale = trace.saved[self.depth - 1 :]
            along = (error * normed).mean(-1, keepdim=True)
            error = scale * (error - error.mean(-1, keepdim=True) - normed * along)
        errors = [error]
        for layer in range(self.depth - 1, 0, -1):
            errors.append((errors[-1] @ weights[layer].mT) * slopes[layer - 1])
        return tuple(reversed(errors))
