"""m ← αm − ηPg, W ← W + m: momentum whose gradients are mapped to values P (Nested Learning, eq. 46–47).

A step of gradient descent on ⟨m gᵀ, P⟩ + λ/2 ‖m‖², α = 1 − ηλ. With P = I it is heavy-ball momentum (eq. 33), a memory
without keys; with P = 1/√V it remembers gradients in AdaGrad's or RMSProp's coordinates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.optim.base import GradientMemory, Optimizer, Params, State, blank, every
from nestling.optim.preconditioners import Identity, Preconditioner


class Preconditioned(Optimizer):
    """Base of optimizers that keep one matrix of preconditioned gradients, m ← what is kept of m, + Pg."""

    def __init__(self, params: Params, preconditioner: Preconditioner | None, defaults: dict[str, Any]) -> None:
        self.preconditioner: Preconditioner = Identity() if preconditioner is None else preconditioner
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        return {"momentum": blank(p), **self.preconditioner.start(p)}

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        momentum = every(states, "momentum")
        self._forget(group, params, grads, states)
        torch._foreach_add_(
            momentum, [self.preconditioner.apply(g, state) for g, state in zip(grads, states, strict=True)]
        )
        return momentum

    @abstractmethod
    def _forget(
        self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        """Leave of m, in place, what is kept of it."""

    @property
    def _tensors(self) -> tuple[str, ...]:
        """Names of what is remembered of a parameter."""
        return "momentum", *self.preconditioner.start(torch.empty(0))


class PreconditionedMomentum(Preconditioned):
    """Momentum of preconditioned gradients.

    lr               η, outside the memory (see `nestling.optim.base`); its default is ours, as all defaults here
    momentum         α, share of the momentum that is kept: [0, 1]; 0.9 keeps half its weight in the last 7 gradients
    preconditioner   P: `Identity()`, `Diagonal(beta)`, or one of yours
    weight_decay     λ, decoupled

    With `Identity()` it equals `torch.optim.SGD(lr, momentum)` step by step.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        *,
        preconditioner: Preconditioner | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, preconditioner, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _forget(
        self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        torch._foreach_mul_(every(states, "momentum"), group["momentum"])

    def memories(self) -> list[GradientMemory]:
        share = self.param_groups[0]["momentum"]
        return [
            GradientMemory(
                "momentum",
                "a matrix without keys",
                f"dot product with {self.preconditioner}",
                f"decay {share}",
                "gradient descent",
                tensors=self._tensors,
            )
        ]
