"""Miras: Memora, Moneta, Yaad.

paper   here
α_t     `retention`
η_t     `lr`
δ_t     `threshold` (eq. 13–16), and Δ of eq. 17
b       `chunk`
p, q    `Lp.p`, `Lq.q`
"""

from nestling.memory.biases import L2, Huber, Lp
from nestling.memory.named import register
from nestling.memory.networks import MLP
from nestling.memory.retentions import Decay, Lq, Softmax
from nestling.memory.rules import Gradient

register(
    "memora",
    equation="Z ← αZ − η∇½‖M(k; softmax(Z)) − v‖², W = softmax(Z)",
    source="Miras, eq. 21 and 27",
    notes="The rule is the paper's in its exact logit form (derived). Softmax over each output unit's inputs, slice sum 1, and "
    "reads at softmax(Z_t) of every token are our defaults, where the paper's chunks are linear in the weights (eq. 30–32), as "
    "with retention=SoftmaxLag(); so is one α and η per head and token, where the paper has them per channel.",
    network=MLP(),
    bias=L2(),
    retention=Softmax(),
    rule=Gradient(),
    chunk=16,
)
register(
    "moneta",
    equation="A ← αA − η∇‖M(k; W) − v‖₃³, W = A/‖A‖₄²",
    source="Miras, eq. 24–25; network as in its §5.3",
    notes="From the paper: p = 3, q = 4, the dual state, smooth sign and modulus, normalizing at the end of chunks (§5.4). Our "
    "defaults: the printed read-out, a norm over each whole weight matrix, at least 0.001, A of norm 1 at the start, slope "
    "10 in tanh. The printed read-out shrinks as A grows; LqDual() has the exact one, LqDual(mean=True) one of A's own size. "
    "Steps of a layer are a 25th of the usual, as longer ones let W vanish. They grow with the square of an error, also where "
    "values are larger than the network can answer: Lp(3, cap=2) learns those too, and unit values as well. One α and η per head "
    "and token, where the paper has them per channel.",
    network=MLP(),
    bias=Lp(3.0),
    retention=Lq(4.0),
    rule=Gradient(),
    chunk=16,
)
register(
    "yaad",
    equation="W ← αW − η∇½‖M(k) − v‖² where ‖M(k) − v‖ ≤ δ, else αW − ηδ∇‖M(k) − v‖₁",
    source="Miras, eq. 16 and 26; network as in its §5.3",
    notes="The rule is the paper's, with ½ in the quadratic branch. Our default: one threshold δ per head and token for the test "
    "and the step, one α and one η (the paper has them per channel). Huber('coordinate') is the continuous alternative.",
    network=MLP(),
    bias=Huber("mixture"),
    retention=Decay(),
    rule=Gradient(),
    chunk=16,
)
