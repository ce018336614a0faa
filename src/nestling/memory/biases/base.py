"""What every attentional bias answers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Bias(Protocol):
    """A loss ℓ(p, v) of a prediction p = M(k) and a value v, both `[…, value_dim]`."""

    @property
    def window(self) -> int:
        """How many of the last tokens one step's loss sums (1: only the token itself)."""
        ...

    @property
    def reads_prediction(self) -> bool:
        """Whether ∂ℓ/∂p depends on p. If not, the gradient of a matrix memory does not read its weights."""
        ...

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        """ℓ, `[…]`. The reference differentiates it."""
        ...

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        """∂ℓ/∂p, `[…, value_dim]`, in closed form."""
        ...
