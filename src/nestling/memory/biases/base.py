"""What every attentional bias answers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Bias(Protocol):
    """A loss ℓ(p, v) of a prediction p = M(k) and a value v, both `[…, value_dim]`."""

    @property
    def window(self) -> int:
        """How many of the last tokens one step's loss sums. Default: 1, only the token itself."""
        return 1

    @property
    def reads_prediction(self) -> bool:
        """Whether ∂ℓ/∂p depends on p. If not, the gradient of a matrix memory does not read its weights.

        Default: it does.
        """
        return True

    @abstractmethod
    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        """ℓ, `[…]`. The reference differentiates it."""
        ...

    @abstractmethod
    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        """∂ℓ/∂p, `[…, value_dim]`, in closed form."""
        ...


def reads_threshold(bias: Bias) -> bool:
    """Whether the bias reads `gates.threshold`.

    If so, `loss` and `error` take a target `[…, value_dim + 1]`: the value and, as its last coordinate, the threshold. So it
    goes wherever a value goes: into tiles, across chunk borders and through windows.
    """
    return bool(getattr(bias, "reads_threshold", False))
