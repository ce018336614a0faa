"""The classics that the papers rewrite as memories, and the baselines of their tables."""

from nestling.memory.biases import L2, DotProduct
from nestling.memory.named import register
from nestling.memory.networks import MLP, Matrix
from nestling.memory.retentions import Decay, Full
from nestling.memory.rules import DeltaGradient, Gradient, Implicit

register(
    "linear_attention",
    equation="W ← W + η kᵀv",
    source="Nested Learning, eq. 14–18 and 64; Miras, Table 1",
    notes="From the paper. The classic has no step size: give no lr.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Full(),
    rule=Gradient(),
)
register(
    "retnet",
    equation="W ← αW + η kᵀv",
    source="Miras, Table 1",
    notes="From the paper. RetNet fixes α per head; here it is a gate per token, of which a constant is one case.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=Gradient(),
)
register(
    "mamba2_like",
    equation="W ← αW + Δ kᵀv, α = exp(−aΔ), Δ = lr",
    source="Miras, Table 1; Nested Learning, eq. 64",
    notes="Like Mamba-2: our source is not its paper. Equal to retnet on equal gates. What tells them apart is where the gates "
    "come from: RetNet's α is one number per head and its write has no step; here one step size Δ per token, read from input, "
    "both writes (lr = Δ) and decays (log_retention = −aΔ), with a > 0 per head. A memory layer reads both gates "
    "apart, unless it is made with tied=True, as that of the zoo's model is.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=Gradient(),
)
register(
    "gla",
    equation="W ← diag(α)W + η kᵀv",
    source="Miras, Table 1",
    notes="Like GLA: our source is not its paper. Every channel of the key has its own α. The classic has no step size: give no "
    "lr.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(per_channel=True),
    rule=Gradient(),
)
register(
    "longhorn",
    equation="W ← W − β kᵀ(kW − v), β = η/(1 + η‖k‖²), η = lr",
    source="Titans, eq. 35; Miras, Table 1",
    notes="From the paper: the implicit step of ½‖kW − v‖², in the form of deltanet, and equal to it with the damped step. One η "
    "per head and token, where Longhorn has one per channel of the value.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Full(),
    rule=Implicit(),
)
register(
    "rwkv7_like",
    equation="W ← (diag(α) − β kᵀk)W + η kᵀv, β = delta",
    source="Miras, Table 1; Atlas, Table 1",
    notes="Like RWKV-7: our source is not its paper. Channel decay, a delta rule that erases what stood before the decay, with "
    "a strength of its own (delta; not given: lr). Miras's table prints diag(α)(I − βkᵀk)W, "
    "where the removal decays as well. Left out: a removal key apart from the key, and strengths per channel.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(per_channel=True),
    rule=DeltaGradient("with_decay"),
)
register(
    "comba_like",
    equation="W ← (αI − β kᵀk)W + η kᵀv, β = delta",
    source="Titans, appendix C; baseline of Nested Learning's tables",
    notes="Like Comba: our source is not its paper. Scalar decay plus a rank-one removal with a strength of its own (delta; not "
    "given: lr) from what stood before the decay; gated_deltanet decays first. Left out: correcting the query by the key.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=DeltaGradient("with_decay"),
)
register(
    "deltanet",
    equation="W ← W − β kᵀ(kW − v), β = lr",
    source="Miras, Table 1; Nested Learning, eq. 65",
    notes="From the paper, whose objective is L2: its gradient at the running weights is taken apart into what it writes, the "
    "dot product's step, and what it erases, the rule's, so that chunk has no effect. Equal to titans with Matrix(), no "
    "momentum, no decay and chunk 1.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Full(),
    rule=DeltaGradient("after_decay"),
)
register(
    "gated_deltanet",
    equation="W ← αW − β kᵀ(kαW − v), β = lr",
    source="Miras, Table 1; Titans, appendix C",
    notes="From the paper, whose objective is L2, in the form of deltanet: decay first, then erase and write. Titans without "
    "momentum measures before it decays, and differs.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=DeltaGradient("after_decay"),
)
register(
    "ttt_linear",
    equation="W ← W − (η/d) ∇½‖k + LN(kW) − v‖²",
    source="Miras, Table 1; the settings of the TTT paper: residual, layer norm, step 1/d, mini-batch 16",
    notes="From the paper, but for this: the layer norm has gain 1 and shift 0, where the TTT references have a slow affine map, "
    "and there is no fast bias vector.",
    network=MLP(depth=1, init_scale=0.16),
    bias=L2(),
    retention=Full(),
    rule=Gradient(per_key_dim=True),
    chunk=16,
)
register(
    "ttt_mlp",
    equation="W ← W − (η/d) ∇½‖k + LN(GELU(kW₁)W₂) − v‖²",
    source="Miras, Table 1; the settings of the TTT paper: expansion 4, tanh-GELU, residual, layer norm, step 1/d, mini-batch 16",
    notes="From the paper, but for this: the layer norm has gain 1 and shift 0, where the TTT references have a slow affine map, "
    "and there are no fast bias vectors.",
    network=MLP(depth=2, expansion=4.0, activation="gelu_tanh", init_scale=0.16),
    bias=L2(),
    retention=Full(),
    rule=Gradient(per_key_dim=True),
    chunk=16,
)
