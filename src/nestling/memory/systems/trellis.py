"""Trellis: two passes of online compression into a fixed number of slots.

paper   here
β_t     `retention`
γ_t     `lr`
α_t     the code of a token, made by `code`
B       `chunk`
"""

from nestling.memory.named import register
from nestling.memory.trellis import Trellis

register(
    "trellis",
    equation="M_K ← βM_K − γkᵀu, M_V ← βM_V − γvᵀu', u = J_φᵀ(φ(xM) − α); y = φ(f(qM_K) M_Vᵀ)",
    source="Trellis, eq. 4–14",
    notes="From the paper: two passes with one target α, the gradient through φ before the decay, the first read without φ and "
    "the second with it, LN-SiLU between them, stale gradients in chunks, 64 slots. Derived: the second pass in matrices and the "
    "read-out from the chunk's start (eq. 12 is a misprint). Our defaults: φ = SiLU, codes of unit norm from a slow projection "
    "of key and value side by side, values of unit norm, one γ and one β for both passes, empty states at first, chunk 64. "
    "Without a prediction it is ABC or GSA (Trellis.objective says with which settings).",
    factory=Trellis,
)
