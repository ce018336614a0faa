"""Titans.

paper   here
α_t     1 − `retention`
η_t     `momentum`, μ in our equations
θ_t     `lr`, η in our equations
b       `chunk`
C       `window` of the models: tokens of a segment
L_M     `MLP.depth`
"""

from nestling.memory.biases import L2
from nestling.memory.named import register
from nestling.memory.networks import MLP
from nestling.memory.retentions import Decay
from nestling.memory.rules import Momentum

register(
    "titans",
    equation="S ← μS − η∇½‖M(k) − v‖², W ← αW + S, M(x) = x + LN(GELU(xW₁)W₂)",
    source="Titans, eq. 12–15; network as in Miras, §5.3",
    notes="The rule is the paper's, with ½ in the loss; network and chunk are our defaults, as the paper names neither.",
    network=MLP(),
    bias=L2(),
    retention=Decay(),
    rule=Momentum(),
    chunk=16,
)
