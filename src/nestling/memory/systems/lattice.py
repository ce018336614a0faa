"""Lattice: slots written with what is orthogonal to them, for three objectives.

paper   here
S       states of d × m, slots as columns: here as rows, `[slot, dim]`
"""

from nestling.memory.lattice import Lattice
from nestling.memory.named import register

NOTES = (
    "From the paper's abstract: a fixed number of slots, one step of online gradient descent a token, each slot written only "
    "with what is orthogonal to it, a gate that depends on state and input, training in parallel chunks. Derived: the gradient "
    "through the normalized slots, tokens' norms inside a chunk, retraction at its end, and what `form` says of a chunk's "
    "inside: the step at its start, or a gate on the running slots. Known from descriptions alone: the three objectives. Our "
    "defaults: unit slots by retraction and so no forget gate, codes of unit norm from slow projections of keys and queries, 64 "
    "slots, chunk 16, the step at the chunk's start, reading the normalized slots after the write."
)
STEP = "s_i ← s_i/‖s_i‖ at chunk ends, y = q φ(S)"

register(
    "lattice_decode",
    equation=f"s_i ← s_i − γ (k_i/n_i) (kφ(S) − v) P_i, {STEP}",
    source="Lattice, abstract",
    notes=NOTES,
    factory=Lattice,
    objective="decoding",
)
register(
    "lattice_similarity",
    equation=f"s_i ← s_i + γ (k_i/n_i) v P_i, {STEP}",
    source="Lattice, abstract",
    notes=NOTES,
    factory=Lattice,
    objective="similarity",
)
register(
    "lattice_encode",
    equation=f"s_i ← s_i − γ ((v·f_i − k_i)/n_i) v P_i, {STEP}",
    source="Lattice, abstract",
    notes=NOTES,
    factory=Lattice,
    objective="encoding",
)
