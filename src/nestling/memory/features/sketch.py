"""Random sketches of the tensor powers: φ_i(x) = √(a_i/m) (xR_{i1}) ∘ … ∘ (xR_{ii}), the cheap variant for high degrees.

With independent R of entries ±1, E[φ_i(q)·φ_i(k)] = a_i (q·k)ⁱ: the polynomial kernel (Atlas, eq. 5) in the mean alone, with an
error that falls with the root of the size m. Atlas cites such sketches (PolySketchFormer) without saying that it uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.features.base import Features
from nestling.memory.settings import whole_numbers


@dataclass(frozen=True)
class Sketch(Features):
    """x itself, 1, and `size` sketched features for each degree from 2 to `degree`; a_i = 1/i!.

    The signs R are parameters: drawn once at `init`, and free to be learned.
    """

    degree: int = 2
    size: int = 128

    def __post_init__(self) -> None:
        whole_numbers(self, least=2, degree=self.degree)  # lower powers need no sketch
        whole_numbers(self, size=self.size)

    def __str__(self) -> str:
        return f"random sketch of the polynomial of degree {self.degree}, {self.size} features a degree"

    def width(self, key_dim: int) -> int:
        return key_dim + 1 + (self.degree - 1) * self.size

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        return ((key_dim, self.size),) * (self.degree * (self.degree + 1) // 2 - 1)

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return tuple(
            2.0 * torch.randint(0, 2, (heads, *shape), generator=generator) - 1 for shape in self.shapes(key_dim)
        )

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        made, used = [x, torch.ones_like(x[..., :1])], 0
        for degree in range(2, self.degree + 1):
            power = x @ own[used]
            for factor in own[used + 1 : used + degree]:
                power = power * (x @ factor)
            made.append(power * (math.factorial(degree) * self.size) ** -0.5)
            used += degree
        return torch.cat(made, -1)
