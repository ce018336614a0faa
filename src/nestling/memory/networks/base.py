"""What every memory network answers. Row vectors: x `[…, in]`, weights `[…, in, out]`, prediction x @ W."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Linear = Callable[[int, Tensor], Tensor]
"""`linear(layer, h)` returns h @ W of that layer: at fixed weights, or at the running weights of every token."""


class Trace(NamedTuple):
    """What a forward pass at the anchor leaves for the inner gradient.

    inputs      x_l, the input of each layer `[…, time, in_l]`
    products    x_l W_l of each layer `[…, time, out_l]`
    prediction  M(k) `[…, time, value_dim]`
    saved       whatever the network's own `errors` needs
    """

    inputs: tuple[Tensor, ...]
    products: tuple[Tensor, ...]
    prediction: Tensor
    saved: tuple[Tensor, ...]


@runtime_checkable
class Network(Protocol):
    """A map from keys to values whose weights are matrices; the gradient of one token is rank one in each of them."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of weight matrices."""
        ...

    @abstractmethod
    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        """(in, out) of every weight matrix, first applied first. Raises ValueError for dimensions it cannot join."""
        ...

    @abstractmethod
    def init(
        self, shapes: Sequence[tuple[int, int]], heads: int, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """Initial weights `[head, in, out]`."""
        ...

    @abstractmethod
    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        """M(x), with every product by a weight matrix asked of `linear`. The one definition of the map."""
        ...

    @abstractmethod
    def trace(self, weights: Sequence[Tensor], k: Tensor) -> Trace:
        """M(k) at fixed weights, with what the inner gradient needs."""
        ...

    @abstractmethod
    def errors(self, weights: Sequence[Tensor], trace: Trace, error: Tensor) -> tuple[Tensor, ...]:
        """Backpropagate error = ∂ℓ/∂M(k): δ_l `[…, time, out_l]`, so that ∂ℓ/∂W_l = x_lᵀ δ_l. Analytic and differentiable."""
        ...


def at(weights: Sequence[Tensor]) -> Linear:
    """The `linear` of fixed weights."""
    return lambda layer, h: h @ weights[layer]
