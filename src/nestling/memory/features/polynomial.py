"""φ(q)·φ(k) = Σ_{i≤p} a_i (q·k)ⁱ: all monomials up to degree p, with learned coefficients (Atlas, eq. 5).

    φ(x) = [√a_1 x, √a_0, √(a_2 2!) x^β/√β!, …],    one feature for every multi-index β of each degree

so that D = C(d + p, p), and a matrix memory's capacity grows with dᵖ (Atlas, prop. 2). The weights 1/√β! make the kernel exact;
plain monomials have another one (derived). a_i = exp(θ_i)/i! > 0 with θ_i = 0 at first: the truncated exponential.

D is 2145 for d = 64 at p = 2. `reduce` takes degrees from 2 on of r = xR, R a learned projection to fewer dimensions, and keeps
x itself whole: the kernel is then a_0 + a_1 q·k + Σ_{i≥2} a_i (qR·kR)ⁱ (our choice; the paper is silent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from nestling.memory.features.base import Features
from nestling.memory.settings import whole_numbers


@dataclass(frozen=True)
class Polynomial(Features):
    """Polynomial features up to `degree`.

    degree   p
    reduce   dimensions that enter products; None, or a key that is no wider: all of the key's. R begins with orthogonal columns,
             scaled so that q·k stays what it is in the mean
    """

    degree: int = 2
    reduce: int | None = None

    def __post_init__(self) -> None:
        whole_numbers(self, degree=self.degree)
        if self.reduce is not None:
            whole_numbers(self, reduce=self.reduce)

    def __str__(self) -> str:
        return f"polynomial of degree {self.degree}" + (
            f", of keys reduced to {self.reduce} dimensions" if self.reduce else ""
        )

    def _reduces(self, key_dim: int) -> bool:
        return self.reduce is not None and self.reduce < key_dim and self.degree > 1

    def width(self, key_dim: int) -> int:
        base = self.reduce if self.reduce is not None and self.reduce < key_dim else key_dim
        return key_dim + 1 + sum(count(base, degree) for degree in range(2, self.degree + 1))

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        coefficients = (1, self.degree + 1)
        if not self._reduces(key_dim):
            return (coefficients,)
        assert self.reduce is not None
        return (coefficients, (key_dim, self.reduce))

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        logs = torch.zeros(heads, 1, self.degree + 1)
        if not self._reduces(key_dim):
            return (logs,)
        assert self.reduce is not None
        columns = torch.linalg.qr(torch.randn(heads, key_dim, self.reduce, generator=generator)).Q
        return (logs, columns * (key_dim / self.reduce) ** 0.5)

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        root = (0.5 * own[0]).exp()  # √(a_i i!) `[head, 1, degree + 1]`
        made = [root[..., 1:2] * x, root[..., :1].expand(*x.shape[:-1], 1)]
        base = x @ own[1] if len(own) > 1 else x
        power, first, run = base, torch.arange(base.shape[-1], device=x.device), None
        for degree in range(2, self.degree + 1):
            left, right = pairs(base.shape[-1], degree, x.device)
            again = first[right] == left  # the new factor equals the monomial's first one
            run = torch.where(again, 1 if run is None else run[right], 0) + 1
            power = base[..., left] * power[..., right] * run.to(x.dtype).rsqrt()  # x^β/√β!, factor by factor
            first = left
            made.append(root[..., degree : degree + 1] * power)
        return torch.cat(made, -1)


def count(variables: int, degree: int) -> int:
    """Number of monomials of exactly this degree."""
    return comb(variables + degree - 1, degree)


def pairs(variables: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each monomial of a degree as (variable j, place of a monomial one degree lower that has none before j).

    Monomials stand in the order of their variables, smallest first, so that those with none before j are the last ones.
    """
    sizes = [count(variables - j, degree - 1) for j in range(variables)]
    total, lower = sum(sizes), sizes[0]
    each = torch.tensor(sizes, device=device)
    left = torch.repeat_interleave(torch.arange(variables, device=device), each, output_size=total)
    shift = lower - each.cumsum(0)  # from the place in this degree to that in the lower one
    return left, torch.arange(total, device=device) + shift[left]
