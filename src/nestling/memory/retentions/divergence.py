"""f-divergence retention on a simplex (Miras, eq. 18): a step is as long as a divergence from the last weights allows.

    W_t = argmin_W η_t⟨∇ℓ(W_{t−1}), W⟩ + Σ W_{t−1} f(W/W_{t−1}),      W ≥ 0, Σ W = 1
        = W_{t−1} ∘ g(−ζ_t − η_t ∇ℓ(W_{t−1})),                         g = (f')⁻¹, ζ_t such that Σ W_t = 1

    "kl"         f(τ) = τ log τ         g(u) = eᵘ up to ζ      the exponentiated gradient: `Softmax` without a decay
    "hellinger"  f(τ) = (√τ − 1)²       g(u) = (1 − u)⁻²       heavier tails: entries fall by a power
    "softplus"   any increasing g may stand for (f')⁻¹ (§5.2): here log(1 + eᵘ), which grows no faster than u

The multiplier ζ has no closed form in general; the sum falls with it, so that it is found by bisection, and its own derivative
by the implicit function. A slice is the inputs of one output unit, with sum 1 (our default, as in `Softmax`). Only "kl" becomes
a dual that is linear over time. In a chunk the steps add up, W_t = W_0 − Σ η_i ∇ℓ_i, and may leave the simplex; at its end the
map takes them all at once from the anchor (linear inside, non-linear across chunks: Miras, §5.4). Chunk 1 is the printed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestling.memory.retentions.base import Settled

HALVINGS = 60  # of the bracket around ζ; the Newton step behind them makes it exact
_ONE = {"kl": 0.0, "hellinger": 0.0, "softplus": math.log(math.e - 1)}  # where g is 1
_END = {"kl": math.inf, "hellinger": 1.0, "softplus": math.inf}  # where g ends


@dataclass(frozen=True)
class Divergence(Settled):
    """Weights on the simplex, multiplied at every chunk's end; reads no gate. A network's initial weights are taken as logits."""

    f: Literal["kl", "hellinger", "softplus"] = "kl"

    def __post_init__(self) -> None:
        if self.f not in _ONE:
            raise ValueError(f"Divergence.f is {self.f!r}; expected one of: {', '.join(_ONE)}")

    def __str__(self) -> str:
        name = {
            "kl": "KL divergence",
            "hellinger": "Hellinger divergence",
            "softplus": "divergence of a softplus inverse",
        }
        return f"{name[self.f]} from the last weights, on a simplex"

    @property
    def decays(self) -> bool:
        return False

    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """g(u) and g'(u)."""
        if self.f == "kl":
            return u.exp(), u.exp()
        if self.f == "hellinger":
            return (1 - u) ** -2, 2 * (1 - u) ** -3
        return torch.nn.functional.softplus(u), u.sigmoid()

    def multiplier(self, step: Tensor, base: Tensor) -> Tensor:
        """ζ `[…, 1, out]` with Σ base ∘ g(step − ζ) = 1, where Σ base = 1; step, base `[…, in, out]`. Differentiable once."""
        with torch.no_grad():
            high = step.amax(-2, keepdim=True) - _ONE[self.f]
            low = step.amin(-2, keepdim=True) - _ONE[self.f]
            if math.isfinite(end := _END[self.f]):
                low = torch.maximum(low, step.amax(-2, keepdim=True) - end * (1 - 1e-6))
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                above = (base * self.inverse(step - middle)[0]).sum(-2, keepdim=True) > 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            found = (low + high) / 2
        value, slope = self.inverse(step - found)
        falls = (base * slope).sum(-2, keepdim=True).detach()
        return found + ((base * value).sum(-2, keepdim=True) - 1) / falls

    def settle(self, weights: Tensor, anchor: Tensor) -> Tensor:
        step = weights - anchor
        return anchor * self.inverse(step - self.multiplier(step, anchor))[0]

    def dual(self, initial: Tensor) -> Tensor:
        return (initial * math.sqrt(initial.shape[-2])).softmax(-2)
