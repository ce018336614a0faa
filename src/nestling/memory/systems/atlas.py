"""Atlas: windows of tokens, polynomial features, second-order steps.

paper   here
α_t     `retention`
θ_t     `momentum`, μ in our equations
η_t     `lr`
γ_i     `window`, by the lag t − i
c       `Omega.length`, and `span` of SWDT
p       `Polynomial.degree`
κ       `Muon.steps`
"""

from nestling.memory.biases import L2, DotProduct, Omega
from nestling.memory.features import Polynomial
from nestling.memory.kernel import KernelMemory
from nestling.memory.named import register
from nestling.memory.networks import MLP, GatedMLP, Matrix
from nestling.memory.retentions import Decay, Full
from nestling.memory.rules import Gradient, Muon

register(
    "omeganet",
    equation="W ← αW − η Σ_{i>t−c} γ_i ∇½‖M(φ(k_i)) − v_i‖², M(φ) = x + LN(GELU(φW₁)W₂), φ of degree 2",
    source="Atlas, eq. 8–10 and Table 1",
    notes="From the paper: objective, rule without momentum, two-layer residual memory, polynomial features. Derived: the signs "
    "of eq. 11. Our defaults: η outside the sum, γ of a layer over its sum in the window, c = 8, degree 2 of keys reduced to 16, "
    "the residual adding φ's linear part, layer norm, chunk 16. features=Identity(), network=MLP() leaves the polynomials out, "
    "and is quicker.",
    features=Polynomial(degree=2, reduce=16),
    network=MLP(leading=True),
    bias=Omega(L2(), length=8),
    retention=Decay(),
    rule=Gradient(),
    chunk=16,
)
register(
    "dla",
    equation="W ← αW + η ∇⟨M(φ(k)), v⟩, M(φ) = x + LN(GELU(φW₁)W₂), φ = [x, 1, x^β…] of degree 2",
    source="Atlas, eq. 19 and Table 1 (deep linear attention)",
    notes="From the paper: rule, bias and polynomial features; the bias's sign is that of its results, as eq. 19 prints descent "
    "on +⟨M, v⟩. Derived: feature weights that make the kernel exact. Our defaults: degree 2 of keys reduced to 16, the residual "
    "adding φ's linear part, layer norm, chunk 16. With Matrix() and no features it is retnet.",
    features=Polynomial(degree=2, reduce=16),
    network=MLP(leading=True),
    bias=DotProduct(),
    retention=Decay(),
    rule=Gradient(),
    chunk=16,
)
register(
    "swla",
    equation="W ← αW + η Σ_{i>t−c} γ_i φ(k_i)ᵀv_i",
    source="Atlas, eq. 20 and Table 1 (sliding-window linear attention)",
    notes="From the paper, with its linear memory, so that chunk has no effect. With γ = 1 a token is written c times (derived). "
    "Our defaults: γ of a layer over its sum in the window, c = 8, features of degree 2 of keys reduced to 16. With window 1 and "
    "no features it is retnet.",
    features=Polynomial(degree=2, reduce=16),
    network=Matrix(),
    bias=Omega(DotProduct(), length=8),
    retention=Decay(),
    rule=Gradient(),
)
register(
    "atlas",
    equation="S ← μS − Σ_{i>t−c} γ_i ∇½‖M(φ(k_i)) − v_i‖², W ← αW + η NS₅(S) at chunk borders",
    source="Atlas, eq. 32–33 and 42, appendix D.4",
    notes="From the paper: objective, momentum, Newton–Schulz of 5 steps, two-layer residual memory, polynomial features. "
    "Derived: the signs (Table 1 mixes two conventions) and η outside the sum. Our defaults: NS at chunk borders for speed "
    "(rule=Muon('token') is the exact form), η of a layer at most 0.05 and γ over its sum in the window, c = 8, degree 2 of "
    "keys reduced to 16, the residual adding φ's linear part, chunk 16.",
    features=Polynomial(degree=2, reduce=16),
    network=MLP(leading=True),
    bias=Omega(L2(), length=8),
    retention=Decay(),
    rule=Muon("chunk"),
    chunk=16,
)
register(
    "atlas_plus",
    equation="as atlas, with M(φ) = x + LN((GELU(φW₂) ∘ φW₃)W₁)",
    source="Atlas, eq. 43 and Table 1 (Atlas++)",
    notes="As atlas; from the paper: the gated memory.",
    features=Polynomial(degree=2, reduce=16),
    network=GatedMLP(leading=True),
    bias=Omega(L2(), length=8),
    retention=Decay(),
    rule=Muon("chunk"),
    chunk=16,
)
register(
    "deep_transformer",
    equation="W ← W + η ∇⟨M(φ*(k)), v⟩, φ*(q)·φ*(k) = exp(s q·k): z(q) = qW₁ + Σ_j a_j κ(k_j, q) u_j / Σ_j a_j κ(k_j, q)",
    source="Atlas, eq. 25–26 and Table 1 (DeepTransformer)",
    notes="From the paper: bias, rule, exponential features; with Matrix() it is softmax attention, and with normalized=False "
    "the paper's unnormalized one. Derived: φ* in the first layer alone, kept as pairs of a key and what it wrote. Our "
    "defaults: dividing by the kernels' sum (Table 1 says without, and outputs then grow with the text), the learned scale s, "
    "two layers with residual and layer norm, chunk 16. Its state grows with the tokens read.",
    factory=KernelMemory,
    network=MLP(),
    bias=DotProduct(),
    retention=Full(),
    normalized=True,
    chunk=16,
)
register(
    "swdt",
    equation="W_t = W_0 + Σ_{i>t−c} η_i ∇⟨M(φ*(k_i)), v_i⟩ at W_0, reads over the kernels' sum",
    source="Atlas, eq. 18 and Table 1 (sliding-window DeepTransformer)",
    notes="From the paper: bias, rule, exponential features, the window; with Matrix() it is sliding-window attention. Derived: "
    "that nothing older is retained, so that the state is a window, and gradients at the initial weights. Our defaults: c = 32, "
    "dividing by the kernels' sum, the learned scale, two layers with residual and layer norm.",
    factory=KernelMemory,
    network=MLP(),
    bias=DotProduct(),
    retention=Full(),
    normalized=True,
    span=32,
    chunk=16,
)
register(
    "dot",
    equation="W ← αW − η Σ_{i>t−c} γ_i ∇½‖M(φ*(k_i)) − v_i‖², φ*(q)·φ*(k) = exp(s(q·k − 1))",
    source="Atlas, eq. 27 and 30–31, Table 1 (deep Omega transformer)",
    notes="From the paper: objective, rule, exponential features, no normalization. Derived: the sign of eq. 30–31, φ* in the "
    "first layer alone, kept as pairs. Our defaults: the kernel's factor e^{−s}, by which an exact repetition is corrected once "
    "and not e^s times, the learned scale s, γ of a layer over its sum in the window, c = 8, decay, two layers with residual and "
    "layer norm, chunk 16. Its state grows.",
    factory=KernelMemory,
    network=MLP(),
    bias=Omega(L2(), length=8),
    retention=Decay(),
    normalized=False,
    chunk=16,
)
