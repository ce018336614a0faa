"""L_q retention (Miras, §5.2 and eq. 24): the dual A is carried, the weights are A over a power of its norm.

    A_t = α_t A_{t−1} − η_t ∇ℓ(W),      W = A / ‖A‖_q^{q−2}                                    "printed"
                                        W = sign(A) ∘ |A|^{q−1} / ‖A‖_q^{q−2}                  "dual"

"printed" is the paper's read-out, and Moneta's. The power that it lacks is in "dual", the minimizer of
⟨−A, W⟩ + ½‖W‖_{q'}², 1/q + 1/q' = 1 (derived); both are the identity for q = 2. The norm runs over a whole weight matrix.

The printed read-out shrinks as A grows: it has degree 3 − q, so for q = 4 twice A is half of W, and W has no bound as A goes
to 0, nor does strong decay let the weights fade. So A starts with norm 1, where W = A, and the norm counts as at least `floor`
below, under which W fades with A. Inside a chunk the scale stands at its anchor, as the paper normalizes at the end of chunks
(§5.4, eq. 29; its last token reads the new scale): A is linear there, and "printed" costs about as much as a plain decay. A is
what is carried, never W: normalizing W again at every chunk would turn its norm n into 1/n each time.

Steps as long as those of other memories make A so large within a few chunks that nothing is left of W, and nothing is recalled
(measured; so do those of a dual over a power mean). A layer's largest step is therefore a 25th of the usual (our default).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.retentions.base import Retention, Scaled
from nestling.memory.settings import numbers, switches

SMALL = 0.04  # of a layer's largest step


def _norm(dual: Tensor, q: float, floor: float) -> Tensor:
    """‖A‖_q over the last two dimensions, kept, at least `floor`. The largest entry is taken out, so that no power overflows."""
    size = dual.abs()
    top = size.detach().amax((-2, -1), keepdim=True).clamp_min(floor)
    # Under the floor the sum is replaced before the root, whose slope at 0 would be infinite.
    least = (floor / top) ** q
    total = ((size / top) ** q).sum((-2, -1), keepdim=True)
    return top * torch.maximum(total, least) ** (1 / q)


@dataclass(frozen=True)
class Lq(Scaled):
    """The printed read-out W = A / ‖A‖_q^{q−2}.

    q       at least 2; 4 in Moneta. 2: W = A
    floor   the least norm that counts
    """

    q: float = 4.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def __str__(self) -> str:
        return f"decay of a dual, weights the dual over its L{self.q:g} norm to the power {self.q - 2:g}"

    @property
    def largest_step(self) -> float:
        return SMALL if self.q > 2 else 1.0

    def scale(self, dual: Tensor) -> Tensor:
        return _norm(dual, self.q, self.floor) ** (2 - self.q)

    def dual(self, initial: Tensor) -> Tensor:
        return initial / _norm(initial, self.q, self.floor) if self.q != 2 else initial


@dataclass(frozen=True)
class LqDual(Retention):
    """The read-out of degree 1, W = sign(A) ∘ |A|^{q−1} / ‖A‖_q^{q−2}: twice A is twice W. Taken at every token.

    mean    the norm is a power mean, over n^{1/q} for n entries: weights are then about as large as A, and a step of A moves them
            as far as one of theirs; without it they are smaller by n^{(q−2)/q}
    """

    q: float = 4.0
    floor: float = 1e-3
    mean: bool = False

    def __post_init__(self) -> None:
        _check(self)
        switches(self, mean=self.mean)

    def __str__(self) -> str:
        norm = f"L{self.q:g} {'power mean' if self.mean else 'norm'}"
        return f"decay of a dual, weights its power {self.q - 1:g} over its {norm} to the power {self.q - 2:g}"

    @property
    def largest_step(self) -> float:
        return SMALL if self.mean and self.q > 2 else 1.0

    def _size(self, x: Tensor) -> Tensor:
        spread: float = (x.shape[-2] * x.shape[-1]) ** (1 / self.q) if self.mean else 1.0
        return _norm(x, self.q, self.floor * spread) / spread

    def link(self, dual: Tensor) -> Tensor:
        if self.q == 2:
            return dual
        share = dual.abs() / self._size(dual)
        # Below q = 3 the power's slope at 0 is infinite, though W's own is 0: 0 · ∞ would be no number.
        zero = share == 0
        return dual * torch.where(zero, 0.0, share.masked_fill(zero, 1.0) ** (self.q - 2))

    def dual(self, initial: Tensor) -> Tensor:
        """The inverse map, so that link(dual(W)) = W (where the norm is above the floor): |A| ∝ |W|^{1/(q−1)}."""
        root = initial.abs() ** (1 / (self.q - 1))
        return initial.sign() * root * self._size(root) ** (self.q - 2)


def _check(owner: Lq | LqDual) -> None:
    numbers(owner, least=2, hint=", the conjugate of an exponent in (1, 2]", q=owner.q)
    numbers(owner, above=0, floor=owner.floor)
