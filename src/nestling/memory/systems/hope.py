"""Nested Learning: the self-modifying memory.

paper   here
η_t     made by M_η, at most `lr_max`
α_t     made by M_α
C       `chunk` and `chunk_others`
C^(ℓ)   `periods` of the models
"""

from nestling.memory.named import register
from nestling.memory.self_modifying import SelfModifying

register(
    "self_modifying",
    equation="k, v, η, α = M_k(x), M_v(x), M_η(x), M_α(x); each W ← (αI − ηkᵀk)W − η∇½‖M(k) − M(v)‖²; M(x) = x + σ(xW₁)W₂",
    source="Nested Learning, eq. 86–91",
    notes="From the paper: the recurrence, self-made targets, two-layer residual memories, a static query, chunk-wise training "
    "with the last chunk's state. Derived: erasing layer by layer. Our defaults: the ½ in the loss, reading before the write "
    "inside a chunk too, scalar gates by slow read-outs, η_max 0.5 (1/chunk without erasing), GELU, widths 4 and 1, chunk 16, no "
    "momentum (with one, steps are averaged).",
    factory=SelfModifying,
)
