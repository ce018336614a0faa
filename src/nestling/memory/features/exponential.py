"""φ*(x) = (1, x, x^{⊗2}/√2!, x^{⊗3}/√3!, …), whose kernel is the exponential: φ*(q)·φ*(k) = exp(q·k) (Atlas, eq. 22–23).

It has infinitely many entries, so that it exists as its kernel alone; memories built on it keep keys (`KernelMemory`).

    κ(q, k) = exp(s(q·k − 1))        s = exp(θ) > 0, one per head, learned; s = √key_dim at first
    κ(q, k) = exp(s q·k)             unit_peak=False, which with s = 1 is the paper's

The scale s is a temperature: of unit vectors, q·k is about 1/√d for a random pair, so that exp(q·k) tells keys hardly apart
(our default). κ = 1 for a unit key itself then: φ* times e^{−s/2}, a constant factor of the steps, without which the exact
repetition of a key would overshoot by e^s in a rule that corrects its prediction (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.settings import numbers, switches

CAP = (
    30.0  # of the exponent, for keys not of unit norm: e^30 is far outside any memory, and its square finite in float32
)


@dataclass(frozen=True)
class Exponential:
    """The kernel of exponential features.

    scale      s at first; None: √key_dim
    unit_peak  κ = 1 between equal unit vectors
    """

    scale: float | None = None
    unit_peak: bool = True

    def __post_init__(self) -> None:
        if self.scale is not None:
            numbers(self, above=0, hint=", or None for √key_dim", scale=self.scale)
        switches(self, unit_peak=self.unit_peak)

    def __str__(self) -> str:
        return f"exponential (by its kernel), exp(s{'(q·k − 1)' if self.unit_peak else ' q·k'})"

    def init(self, key_dim: int, heads: int) -> Tensor:
        """θ `[head, 1, 1]`."""
        scale = key_dim**0.5 if self.scale is None else self.scale
        return torch.full((heads, 1, 1), math.log(scale))

    def exponent(self, q: Tensor, k: Tensor, theta: Tensor) -> Tensor:
        """log κ `[…, head, time, n]` of q `[…, head, time, key_dim]` and k `[…, head, n, key_dim]`."""
        product = q @ k.mT
        return theta.exp() * (product - 1 if self.unit_peak else product)
