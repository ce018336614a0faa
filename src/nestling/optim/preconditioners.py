"""P of a momentum memory: the values its gradients are mapped to (Nested Learning, eq. 46–47; §5 of eq. 38–41).

Objective ⟨m gᵀ, P⟩ in place of ⟨m gᵀ, I⟩, so that a step writes P g where plain momentum writes g. A new one is a class of two
methods; it belongs to an optimizer, not to its groups, as it is no plain number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nestling.optim.base import State, blank


class Preconditioner(Protocol):
    """g ↦ P g, with a memory of its own where it has one."""

    def start(self, p: Tensor) -> State:
        """What it remembers of a parameter before the first gradient."""
        ...

    def apply(self, grad: Tensor, state: State) -> Tensor:
        """P g, in the shape of g. May change `state`, not `grad`."""
        ...


@dataclass(frozen=True)
class Identity:
    """P = I: plain momentum."""

    def start(self, p: Tensor) -> State:
        return {}

    def apply(self, grad: Tensor, state: State) -> Tensor:
        return grad


@dataclass(frozen=True)
class Diagonal:
    """P = 1/(√V + ε) element by element, V ← βV + (1 − β)g²; with β = 1 the sum V ← V + g² (AdaGrad's).

    A memory that learns (eq. 41): V descends on ½‖V − g²‖² with the step size 1 − β; its sum, on −⟨V, g²⟩ with 1 (derived).

    beta   share of V that is kept, in [0, 1]
    eps    outside the root
    """

    beta: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"Diagonal.beta is {self.beta}; expected a share to keep in [0, 1], where 1 sums")

    def start(self, p: Tensor) -> State:
        return {"square": blank(p)}

    def apply(self, grad: Tensor, state: State) -> Tensor:
        square: Tensor = state["square"]
        square.mul_(self.beta).addcmul_(grad, grad, value=1 - self.beta if self.beta < 1 else 1.0)
        return grad / (square.sqrt() + self.eps)


@dataclass(frozen=True)
class Fixed:
    """P as any linear map of the gradient that remembers nothing: `Fixed(lambda g: matrix @ g)`."""

    map: Callable[[Tensor], Tensor]

    def start(self, p: Tensor) -> State:
        return {}

    def apply(self, grad: Tensor, state: State) -> Tensor:
        made = self.map(grad)
        if made.shape != grad.shape:
            raise ValueError(
                f"Fixed.map made {tuple(made.shape)} of a gradient {tuple(grad.shape)}; expected its shape"
            )
        return torch.as_tensor(made, dtype=grad.dtype)
