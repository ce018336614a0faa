"""The optimal memory of gradients, element by element (Nested Learning, eq. 100–105): Adam, AdaGrad and their relatives.

    min_m Σ_i (m g_i − P)² + λm²    ⇒    m* = P Σ g_i / (Σ g_i² + λ)                                  (derived; eq. 102)

    P = Σg²     m* = Σg              momentum (eq. 104)
    P = √Σg²    m* = Σg / √Σg²       Adam's direction (eq. 105)            both as λ → 0, which it is unless a ridge is asked for

Sums may forget: as means with shares β that are kept, M ← β₁M + (1−β₁)g and H ← β₂H + (1−β₂)g². A mean over t steps whose
weights add up to one is M/(1−β^t): Adam's bias correction (derived; the paper has none, and prints sums where Adam has means).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.optim.base import State, every

TARGETS = ("root", "square")


def optimum(
    numerator: Sequence[Tensor], square: Sequence[Tensor], target: str, eps: float, ridge: float = 0.0
) -> tuple[Tensor, ...]:
    """m* of Σg, Σg² and λ, the ridge; eps, outside the root, is what keeps entries that were never touched at 0."""
    if target == "square":
        if not ridge:
            return tuple(numerator)
        return tuple(m / (1 + ridge / h) for m, h in zip(numerator, square, strict=True))
    root = torch._foreach_sqrt(list(square))
    if ridge:  # √H/(H + λ), in an order in which no square that is out of range spoils it
        return tuple(m / (r + ridge / r + eps) for m, r in zip(numerator, root, strict=True))
    if torch.is_grad_enabled():  # inside a model, where the outer loop may differentiate it
        root = torch._foreach_add(root, eps)
    else:
        torch._foreach_add_(root, eps)
    return torch._foreach_div(list(numerator), root)


def remember(memory: list[Tensor], new: Sequence[Tensor], share: float) -> None:
    """memory ← share · memory + (1 − share) · new."""
    torch._foreach_lerp_(memory, list(new), 1 - share)


def remember_squares(memory: list[Tensor], new: Sequence[Tensor], share: float) -> None:
    """memory ← share · memory + (1 − share) · new²."""
    torch._foreach_mul_(memory, share)
    torch._foreach_addcmul_(memory, list(new), list(new), value=1 - share)


def adam(
    grads: list[Tensor],
    states: Sequence[State],
    betas: tuple[float, float],
    eps: float,
    *,
    target: str = "root",
    corrected: bool = True,
    ridge: float = 0.0,
) -> list[Tensor]:
    """Take gradients into "mean" and "square" of every state, and read the optimum; "step" counts."""
    mean, square = every(states, "mean"), every(states, "square")
    remember(mean, grads, betas[0])
    remember_squares(square, grads, betas[1])
    for state in states:
        state["step"] += 1
    if not corrected:
        return list(optimum(mean, square, target, eps, ridge))
    firsts = torch._foreach_div(mean, [1 - betas[0] ** state["step"] for state in states])
    seconds = torch._foreach_div(square, [1 - betas[1] ** state["step"] for state in states])
    return list(optimum(firsts, seconds, target, eps, ridge))
