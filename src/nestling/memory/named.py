"""The named systems: each reads as its choices. A new system is one entry here (and one file for a new choice)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, overload

from nestling.memory.biases import L2, DotProduct, Huber, Lp, Omega
from nestling.memory.features import Polynomial
from nestling.memory.networks import MLP, GatedMLP, Matrix
from nestling.memory.retentions import Decay, Full, Lq, Softmax
from nestling.memory.rules import DeltaGradient, Gradient, Implicit, Momentum, Muon
from nestling.memory.self_modifying import SelfModifying
from nestling.memory.spec import MemorySpec


@dataclass(frozen=True)
class Entry:
    """One named system: what makes it, its choices, its equation in one line, its source, what is ours."""

    factory: type[MemorySpec] | type[SelfModifying]
    choices: dict[str, Any]
    equation: str
    source: str
    notes: str


_SYSTEMS: dict[str, Entry] = {}


def register(
    name: str,
    *,
    equation: str,
    source: str,
    notes: str,
    factory: type[MemorySpec] | type[SelfModifying] = MemorySpec,
    **choices: Any,
) -> None:
    """Add a named system. `choices` are fields of the dataclass `factory`."""
    if name in _SYSTEMS:
        raise ValueError(f"a memory named {name!r} is registered already")
    _SYSTEMS[name] = Entry(factory, choices, equation, source, notes)


def names() -> list[str]:
    """All named systems."""
    return sorted(_SYSTEMS)


@overload
def named(
    name: Literal["self_modifying"], *, key_dim: int = 64, value_dim: int | None = None, **overrides: Any
) -> SelfModifying: ...
@overload
def named(name: str, *, key_dim: int = 64, value_dim: int | None = None, **overrides: Any) -> MemorySpec: ...
def named(name: str, *, key_dim: int = 64, value_dim: int | None = None, **overrides: Any) -> Any:
    """A named system at a size, any choice overridable: `named("titans", key_dim=32, network=Matrix(), chunk=64)`.

    value_dim defaults to key_dim. Raises ValueError for an unknown name or choice.
    """
    if name not in _SYSTEMS:
        raise ValueError(f"memory {name!r} is not known; expected one of: {', '.join(names())}")
    factory, choices = _SYSTEMS[name].factory, {**_SYSTEMS[name].choices, **overrides}
    known = {field.name for field in fields(factory)} - {"name", "key_dim", "value_dim"}
    if unknown := sorted(set(choices) - known):
        raise ValueError(f"{name} has no choice {', '.join(unknown)}; expected some of: {', '.join(sorted(known))}")
    return factory(key_dim=key_dim, value_dim=key_dim if value_dim is None else value_dim, name=name, **choices)


def describe(name: str) -> dict[str, str]:
    """A named system in words: choices, equation, source, and what is from the paper, derived or our default."""
    entry = _SYSTEMS.get(name)
    size = named(name)  # raises for an unknown name
    assert entry is not None
    return {**size.describe(), "equation": entry.equation, "source": entry.source, "notes": entry.notes}


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
    "both writes (lr = Δ) and decays (log_retention = −aΔ), with a > 0 per head. A memory layer reads both gates apart.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=Gradient(),
)
register(
    "gla",
    equation="W ← diag(α)W + η kᵀv",
    source="Miras, Table 1",
    notes="From the paper's table: every channel of the key has its own α. The classic has no step size: give no lr.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(per_channel=True),
    rule=Gradient(),
)
register(
    "longhorn",
    equation="W ← W − β kᵀ(kW − v), β = η/(1 + η‖k‖²), η = lr",
    source="Titans, eq. 35; Miras, Table 1",
    notes="From the paper: the implicit step of ½‖kW − v‖², in the erase-and-write form, so that chunk has no effect. Equal to "
    "deltanet with the damped step. One η per head and token, where Longhorn has one per channel of the value.",
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
    "a strength of its own (delta; not given: lr). Left out: a removal key apart from the key, and strengths per channel.",
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
    notes="From the paper, in the erase-and-write form, so that chunk has no effect. Equal to titans with Matrix(), no "
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
    notes="From the paper: decay first, then erase and write. Titans without momentum measures before it decays, and differs.",
    network=Matrix(),
    bias=DotProduct(),
    retention=Decay(),
    rule=DeltaGradient("after_decay"),
)
register(
    "ttt_linear",
    equation="W ← W − (η/d) ∇½‖k + LN(kW) − v‖²",
    source="Miras, Table 1; the settings of the TTT paper: residual, layer norm, step 1/d, mini-batch 16",
    notes="From the paper; the layer norm has no gain and shift, and there is no bias vector.",
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
    notes="From the paper; the layer norm has no gain and shift, and there are no bias vectors.",
    network=MLP(depth=2, expansion=4.0, activation="gelu_tanh", init_scale=0.16),
    bias=L2(),
    retention=Full(),
    rule=Gradient(per_key_dim=True),
    chunk=16,
)
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
register(
    "omeganet",
    equation="W ← αW − η Σ_{i>t−c} γ_i ∇½‖M(k_i) − v_i‖²",
    source="Atlas, eq. 8–10",
    notes="The rule is the paper's; c = 8 and identity features are our defaults (features=Polynomial(…) "
    "with MLP(leading=True) is the paper's).",
    network=MLP(),
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
    "Our defaults: c = 8, features of degree 2 of keys reduced to 16. With window 1 and no features it is retnet.",
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
    "(rule=Muon('token') is the exact form), c = 8, degree 2 of keys reduced to 16, the residual adding φ's "
    "linear part, chunk 16.",
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
    "memora",
    equation="Z ← αZ − η∇½‖M(k; softmax(Z)) − v‖², W = softmax(Z)",
    source="Miras, eq. 21 and 27",
    notes="The rule is the paper's in its exact logit form (derived). Softmax over each output unit's inputs, slice sum 1, and "
    "reads at softmax(Z_t) of every token are our defaults.",
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
    "10 in tanh. The printed read-out shrinks as A grows; LqDual() has the exact one.",
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
    "and the step (the paper has one per channel). Huber('coordinate') is the continuous alternative.",
    network=MLP(),
    bias=Huber("mixture"),
    retention=Decay(),
    rule=Gradient(),
    chunk=16,
)
register(
    "self_modifying",
    equation="k, v, η, α = M_k(x), M_v(x), M_η(x), M_α(x); each W ← (αI − ηkᵀk)W − η∇½‖M(k) − M(v)‖²; M(x) = x + σ(xW₁)W₂",
    source="Nested Learning, eq. 86–91",
    notes="From the paper: the recurrence, self-made targets, two-layer residual memories, a static query, chunk-wise training "
    "with the last chunk's state. Derived: erasing layer by layer. Our defaults: the ½ in the loss, reading before the write "
    "inside a chunk too, scalar gates by slow read-outs, η_max 0.5, GELU, widths 4 and 1, chunk 16, no momentum.",
    factory=SelfModifying,
)
