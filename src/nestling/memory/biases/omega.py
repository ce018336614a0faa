"""The Omega rule's objective: a weighted sum of the last c tokens' losses (Atlas, eq. 8–9).

    L_t(W) = Σ_{i=t−c+1..t} γ_i^{(t)} ℓ(M(k_i; W), v_i)

γ is `gates.window[…, t, lag]` with lag = t − i. The window reaches across chunk borders, never across a reset or before the
lane's first token. Gradients of older tokens are taken anew at the current anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias, reads_threshold
from nestling.memory.settings import choice, whole_numbers


@dataclass(frozen=True)
class Omega(Bias):
    """`Omega(L2(), length=8)`: any bias, summed over a window of `length` tokens."""

    inner: Bias
    length: int = 8

    def __post_init__(self) -> None:
        choice(self, "inner", self.inner, Bias, "L2()")
        whole_numbers(self, length=self.length)
        if self.inner.window != 1:
            raise ValueError("Omega around another windowed bias: give the inner bias alone and set Omega.length")

    def __str__(self) -> str:
        return f"{self.inner}, summed over the last {self.length} tokens (Omega)"

    @property
    def window(self) -> int:
        return self.length

    @property
    def reads_prediction(self) -> bool:
        return self.inner.reads_prediction

    @property
    def reads_threshold(self) -> bool:
        return reads_threshold(self.inner)

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        return self.inner.loss(prediction, value)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return self.inner.error(prediction, value)
