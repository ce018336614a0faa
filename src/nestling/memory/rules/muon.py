"""S ← μS − Σγ∇ℓ, W ← αW + η NS(S): momentum, orthogonalized by Newton–Schulz before it is added (Atlas, eq. 32–33).

Whole directions of S count alike, however small they are: an approximation of the second-order step. As NS knows nothing of
the scale of S, the step size η stands outside; inside the sum it would only weigh tokens against each other (derived).

Per token, every W_t has its own NS(S_t) (Atlas, eq. 39–41, with the α and η that eq. 41 drops), which costs two orders of
magnitude more than the gradient. Per chunk, the default, S follows every token, but NS acts at a chunk's last token b alone:
W_b = α_b W_{b−1} + η_b NS(S_b), and the tokens before read the decayed weights of the chunk's start (our relaxation; equal at
chunk 1). Between the two, at every r-th token, r dividing the chunk: NS acts at tokens r, 2r, … of the chunk, and a token reads
the last of these, decayed (ours as well; r = 1 is per token, r = chunk per chunk). It costs chunk/r times what per chunk costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nestling.memory.newton_schulz import Iteration, coefficients_of, newton_schulz
from nestling.memory.rules.base import Directed
from nestling.memory.settings import whole_numbers


@dataclass(frozen=True)
class Muon(Directed):
    """Muon as the inner optimizer, on every weight matrix of a memory.

    per         "chunk": Newton–Schulz at chunk borders, fast;  "token": at every token, exact;  a number r: at every r-th one
    steps       Newton–Schulz iterations, the paper's κ
    iteration   "quintic" (Muon's own; singular values in about [0.68, 1.13]) or "cubic" (converges to 1 with more steps)
    """

    per: Literal["chunk", "token"] | int = "chunk"
    steps: int = 5
    iteration: Iteration = "quintic"

    def __post_init__(self) -> None:
        if self.per not in ("chunk", "token") and not (isinstance(self.per, int) and self.per > 1):
            raise ValueError(f"Muon.per is {self.per!r}; expected 'chunk', 'token' or a number of tokens, at least 2")
        whole_numbers(self, least=0, steps=self.steps)
        coefficients_of(self.iteration)

    def __str__(self) -> str:
        where = (
            "at every token" if self.per_token else f"every {self.stride} tokens" if self.stride else "at chunk borders"
        )
        return f"momentum, orthogonalized {where} by Newton–Schulz ({self.steps} {self.iteration} steps)"

    @property
    def largest_step(self) -> float:
        """0.05 (ours; the paper leaves η open). Every step has singular values of about 1, whatever was read, and initial weights
        have 1.4 to 2.6 at most. With the momentum of other memories (μ ≈ 0.5) a step of 0.25 turns them so far that gradients
        grow by five orders of magnitude over 64 borders; with the longer one that layers begin with under Muon it learns, less
        well than this."""
        return 0.05

    @property
    def per_token(self) -> bool:
        return self.per == "token"

    @property
    def stride(self) -> int | None:
        return self.per if isinstance(self.per, int) else None

    def direction(self, s: Tensor) -> Tensor:
        return newton_schulz(s, self.steps, iteration=self.iteration)
