"""TNT: a global memory beside local ones that start afresh with every shard.

paper   here
η_t     `lr`
C_G     `global_chunk`
C_L     `chunk`
S_L     `shard`
M_t     P_t, by `projection`
"""

from nestling.memory.named import register
from nestling.memory.tnt import Tnt

register(
    "tnt",
    equation="o = f(V at its chunk's start, q) + Σ f(W⁽ⁱ⁾, qP), P = Σ kᵀk/‖k‖² over the shard; W⁽ⁱ⁾ ← W_init where it begins",
    source="TNT, eq. 5–7 and 13–15, appendix C",
    notes="From the paper: the global memory's stale read, local memories with chunks and shards of their own, resets in use as "
    "in training, the Q–K projection, a plain sum, global chunk 2048 and shards of 2048. Derived: the local rule starts from the "
    "anchor and P runs over the shard (eq. 6, 7, 14 and 15 are misprinted). Our defaults: the full rule of Titans in every "
    "memory (the paper gives plain gradient descent and leaves its combinations open), q, k, v shared and gates of their own, "
    "q P normalized (projection='literal' is eq. 7), a learned V_0, one local memory of chunk 16.",
    factory=Tnt,
)
