"""Huber biases: quadratic near the value, linear beyond a threshold δ, so that outliers write no more than δ (Miras, §5.1).

With e = M(k) − v and H(a) = ½a² for |a| ≤ δ, else δ(|a| − ½δ):

    "coordinate"   ℓ = Σ_j H(e_j)                               ∂ℓ/∂p = clip(e, −δ, δ)               eq. 13–14
    "norm"         ℓ = H(‖e‖)                                   ∂ℓ/∂p = e · min(1, δ/‖e‖)            eq. 15
    "mixture"      ℓ = ½‖e‖² where ‖e‖ ≤ δ, else δ‖e‖₁          ∂ℓ/∂p = e, else δ sign(e)            eq. 16, Yaad

The ½ makes the first two continuous; the mixture's gradient jumps at the threshold, from norm δ to δ√d (derived).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestling.memory.biases.base import Bias

EPS = 1e-12  # under the root of ‖e‖², which has no slope at 0


@dataclass(frozen=True)
class Huber(Bias):
    """δ is `gates.threshold`, one per lane, head and token (None: 1), and stands as the last coordinate of the target."""

    form: Literal["coordinate", "norm", "mixture"] = "mixture"

    def __post_init__(self) -> None:
        if self.form not in ("coordinate", "norm", "mixture"):
            raise ValueError(f"Huber.form is {self.form!r}; expected 'coordinate', 'norm' or 'mixture'")

    def __str__(self) -> str:
        tail = {"coordinate": "linear", "norm": "linear in its norm", "mixture": "absolute"}[self.form]
        return f"squared error, {tail} beyond a threshold (Huber)"

    @property
    def reads_threshold(self) -> bool:
        return True

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        error, limit = prediction - target[..., :-1], target[..., -1]
        if self.form == "mixture":
            near = _norm(error)[..., 0] <= limit
            return torch.where(near, 0.5 * error.square().sum(-1), limit * error.abs().sum(-1))
        if self.form == "norm":
            return _huber(_norm(error)[..., 0], limit)
        return _huber(error.abs(), limit.unsqueeze(-1)).sum(-1)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        error, limit = prediction - target[..., :-1], target[..., -1:]
        if self.form == "coordinate":
            return torch.where(error.abs() <= limit, error, limit * error.sign())
        size = _norm(error)
        near = size <= limit
        if self.form == "norm":
            return torch.where(near, error, limit * error / size)
        return torch.where(near, error, limit * error.sign())


def _norm(error: Tensor) -> Tensor:
    return (error.square().sum(-1, keepdim=True) + EPS).sqrt()


def _huber(size: Tensor, limit: Tensor) -> Tensor:
    return torch.where(size <= limit, 0.5 * size.square(), limit * (size - 0.5 * limit))
