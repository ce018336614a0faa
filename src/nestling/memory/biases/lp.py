"""ℓ = ‖M(k) − v‖_p^p (Miras, eq. 10–11; value-less L1, eq. 12), by default with the smooth sign and modulus of its remark 5.

    ∂ℓ/∂p = p · tanh(a e) ∘ (e² + ε)^{(p−1)/2}  →  p · sign(e) ∘ |e|^{p−1}     for a → ∞, ε → 0;  e = M(k) − v

The smooth form is defined by this gradient, as in the paper; its loss is the integral. With a cap c the gradient is that of
min(|e|, c), coordinate by coordinate, and the loss goes on as a straight line from there (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias
from nestling.memory.biases.smooth import exact_power, power, sign, signed_power_integral
from nestling.memory.settings import numbers


@dataclass(frozen=True)
class Lp(Bias):
    """Sum of |e|^p over the coordinates. p = 2 is twice `L2()`.

    p       at least 1; 3 in Moneta. A step grows with |e|^{p−1}: large p asks for a small learning rate
    slope   a of the smooth sign, for values of unit scale (the paper names none); None: sign and |e| exactly
    cap     c, the largest |e| of a coordinate that a step grows with; None: there is none, as in the paper
    """

    p: float = 3.0
    slope: float | None = 10.0
    cap: float | None = None

    def __post_init__(self) -> None:
        numbers(self, least=1, hint=", below which the loss is not convex", p=self.p)
        if self.slope is not None:
            numbers(self, above=0, hint=", or None for the exact sign", slope=self.slope)
        if self.cap is not None:
            numbers(self, above=0, hint=", or None for no cap", cap=self.cap)

    def __str__(self) -> str:
        smooth = "" if self.slope is None else ", smooth sign"
        return f"error to the power {self.p:g} (Lp){smooth}{'' if self.cap is None else f', at most {self.cap:g}'}"

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        error = self._capped(prediction - value)
        if self.slope is None:
            loss = exact_power(error, self.p).sum(-1)
        else:
            loss = self.p * signed_power_integral(error, self.p - 1, self.slope).sum(-1)
        if self.cap is None:
            return loss
        return loss + (self._bent(error) * (prediction - value - error)).sum(-1)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return self._bent(self._capped(prediction - value))

    def _capped(self, error: Tensor) -> Tensor:
        return error if self.cap is None else error.clamp(-self.cap, self.cap)

    def _bent(self, error: Tensor) -> Tensor:
        size = (exact_power if self.slope is None else power)(error, self.p - 1)
        return self.p * sign(error, self.slope) * size
