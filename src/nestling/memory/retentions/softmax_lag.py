"""KL retention in the paper's own chunks (Miras, eq. 30–32): one lag token of the full rule, then a chunk linear in the weights.

    W_1 = Softmax(α_1 log W_0 − η_1 ∇ℓ(W_0; k_1, v_1))      a chunk's first token, at the weights of its start
    W_t = α_t W_{t−1} − η_t ∇ℓ(W_1; k_t, v_t)               the others, 1 < t ≤ C: the anchor is W_1
    W_0 = Softmax(log max(W_C, ε/n))                        the next chunk's start:  max(W_C, ε/n) over its sum

A softmax behind every chunk and a logarithm before the next would undo each other, and no token would see the non-linear rule:
hence the lag token. With chunk 1 every token is one, and the rule is eq. 27, as with `Softmax` but for the floor.

Inside a chunk the weights decay and step as plain numbers: they may be negative, and no slice keeps its sum. The paper does not
say what the next logarithm is taken of; ours is the last line. ε is a share of the mean weight 1/n of a slice of n inputs (slice
sum 1, as in `Softmax`): an entry that the chunk took below it keeps so little, but can come back by later steps, which from 0
nothing could. No gradient passes through an entry that is held there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nestling.memory.retentions.base import Lagged

TINY = 1e-30  # what a logarithm takes of initial weights that are 0 or less


@dataclass(frozen=True)
class SoftmaxLag(Lagged):
    """Weights on the simplex at a chunk's start and behind its first token; between, they keep the share `gates.retention`.

    A network's initial weights are taken as logits.

    floor   ε, the least weight behind a chunk, as a share of the mean of its slice
    """

    floor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError(f"SoftmaxLag.floor is {self.floor}; expected a number between 0 and 1")

    def __str__(self) -> str:
        return "decay, weights a softmax behind a chunk's first token and its last (KL)"

    def first(self, step: Tensor, anchor: Tensor, share: Tensor) -> Tensor:
        return (share * anchor.clamp_min(TINY).log() + step).softmax(-2)

    def settle(self, weights: Tensor, anchor: Tensor) -> Tensor:
        held = weights.clamp_min(self.floor / weights.shape[-2])
        return held / held.sum(-2, keepdim=True)

    def dual(self, initial: Tensor) -> Tensor:
        return (initial * math.sqrt(initial.shape[-2])).softmax(-2)
