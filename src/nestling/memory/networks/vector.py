"""M(x) = x ∘ w, or M = w: a memory whose weights are a vector (the vector-valued memories of Miras, §3, in either reading).

The gradient with respect to w is x ∘ δ, or δ, for δ = ∂ℓ/∂M. It is kept as the rank-one product of a constant input 1 and that
row: w is a weight matrix of one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.networks.base import Linear, Network, Trace
from nestling.memory.settings import numbers, switches


@dataclass(frozen=True)
class Vector(Network):
    """One number for every channel, w `[head, 1, value_dim]`.

    keyed: True: x ∘ w, every channel a memory of one number for itself (needs key_dim = value_dim). False: w alone, which has no
        key: with the dot product it sums values, as momentum sums gradients, and with L2 it is their moving average.
    init_scale: standard deviation of the initial entries; 0, the default, is the empty memory.
    """

    keyed: bool = True
    init_scale: float = 0.0

    def __post_init__(self) -> None:
        numbers(self, least=0, init_scale=self.init_scale)
        switches(self, keyed=self.keyed)

    def __str__(self) -> str:
        first = "random" if self.init_scale else "0"
        return f"vector {'times the key, channel by channel' if self.keyed else 'without a key'}, at first {first}"

    @property
    def depth(self) -> int:
        return 1

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.keyed and key_dim != value_dim:
            raise ValueError(
                f"Vector() multiplies the key channel by channel, but the key has {key_dim} and the value {value_dim}: make them "
                "equal, or set keyed=False"
            )
        return ((1, value_dim),)

    def init(
        self, shapes: Sequence[tuple[int, int]], heads: int, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        ((_, value_dim),) = shapes
        if not self.init_scale:
            return (torch.zeros(heads, 1, value_dim),)
        return (torch.randn(heads, 1, value_dim, generator=generator) * self.init_scale,)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        w = linear(0, _one(x))
        return x * w if self.keyed else w

    def trace(self, weights: Sequence[Tensor], k: Tensor) -> Trace:
        one = _one(k)
        w = one @ weights[0]
        return Trace((one,), (w,), k * w if self.keyed else w, (k,))

    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        return (trace.saved[0] * error if self.keyed else error,)


def _one(x: Tensor) -> Tensor:
    """The input of every token, `[…, 1]`."""
    return x.new_ones(*x.shape[:-1], 1)
