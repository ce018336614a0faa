"""Self-modifying Titans: memories that make their own keys, values, step sizes and targets (Nested Learning, eq. 86–91).

    k_t = norm(M_k(x_t))      v_t = M_v(x_t)
    η_t = η_max σ(M_η(x_t) w_η + b_η)      α_t = σ(M_α(x_t) w_α + b_α)
    v̂_□ = M_□(v_t)            every memory □ ∈ {k, v, η, α, main} generates its own target; a constant for the inner gradient
    W   ← (α_t I − ε_t x̂_tᵀ x̂_t) W − η_t ∇_W ℓ(M_□(k_t), v̂_□)      every weight of every memory, x̂ its layer's own input
    y_t = M_main(q_t)                                               read before the write, unless `read` says otherwise

Everything on the right but W itself is taken at the anchors, the weights at the start of the chunk (eq. 90, read causally:
the last state of the previous chunk). The main memory and the others may have chunks of different length. ε_t is η_t for the
first layer, whose input k_t has unit norm, and η_t/(1 + η_t‖x̂‖²) for the others (derived: the paper's bracket fits the first
layer alone). q_t is given: its projection is the one that does not learn in context.

Decay takes the weights to 0, and so a memory with a residual path to M(x) = x, not to where it began. With
`Decay(toward_initial=True)` it returns (derived), while what is erased along a key is still the memory's whole answer:

    W ← (α_t I − ε_t x̂_tᵀ x̂_t) W + (1 − α_t) W_0 − η_t ∇_W ℓ

With momentum, of which the paper gives no equation,

    S ← μ_t S − (1 − μ_t) η_t ∇_W ℓ      W ← (α_t I − ε_t x̂_tᵀ x̂_t) W + S

(1 − μ is ours): a gradient moves W by η in all, as without momentum, but later. With Titans' S ← μS − η∇ℓ (`average=False`) it
moves W by η/(1 − μ), and erases with η alone: C tokens of one key at one anchor then take W along that key to −W/(1 − μ) where
Cη is large. It grows in every chunk, at any μ > 0 and any η_max that is not far below 1/C (derived). With the average a chunk of
one key multiplies weights and momentum by no more than 1, as it does without momentum: at constant gates, over a grid of η ≤ 0.5,
μ, α and C (computed). Gates that change can still leave that region, but must take up large steps at small μ, and hold them at
μ ≈ 1 while nothing is erased.

Nothing holds back what does not erase: a chunk of one key multiplies W by 1 − Cη. η_max = 1/C keeps that in [0, 1], and matrices
bounded with any unit keys and any gates (without momentum; derived).

The read-outs w, b are slow weights: they stand in w0, are read from there at every call and are not part of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.biases import L2, Bias, reads_threshold
from nestling.memory.draw import Draw
from nestling.memory.gates import Factor, Gates, factor
from nestling.memory.inputs import (
    border_guard,
    check_call,
    check_precision,
    check_start,
    check_state,
    overflowed,
    token_guard,
)
from nestling.memory.networks import MLP, Matrix, Network
from nestling.memory.protocol import Call, Engines, Example, Read, TwoEngines
from nestling.memory.retentions import Decay, Retention, Settled, per_channel, toward_initial
from nestling.memory.rules import DeltaGradient, Directed, Implicit, Leader, Nesterov, Rule
from nestling.memory.settings import choice, numbers, read_timing, switches, whole_numbers
from nestling.memory.state import MemoryState, Shapes, Weights, raised

SMALL = 0.02 / 2**0.5  # last layers at first: M(x) ≈ x, so that k ≈ x, v ≈ x and every v̂ ≈ v
FIRST_BIAS = {"lr": -2.0, "retention": 5.0}  # η ≈ 0.12 η_max, α ≈ 0.993
READOUT_STD = 0.02


class Bank(NamedTuple):
    """Memories with one network and one chunk, kept together: each of their weights is `[lane, memory, head, in, out]`.

    layers   which of the state's weights are theirs
    """

    names: tuple[str, ...]
    network: Network
    chunk: int
    layers: slice


class Streams(NamedTuple):
    """Inputs of a scan in the compute dtype; tokens that are not `fine` (bool `[lane, time]`) made harmless."""

    start: MemoryState
    state: MemoryState
    q: Tensor
    k: Tensor
    v: Tensor
    momentum: Factor | None
    readout: dict[str, tuple[Tensor, Tensor]]
    fine: Tensor
    reset: Tensor | None
    valid: Tensor | None


def close(
    spec: SelfModifying,
    closing: Sequence[Tensor],
    anchor: Weights,
    weights: Weights,
    momentum: Weights,
    gone: Tensor | None = None,
) -> tuple[Weights, Weights, Weights, Tensor]:
    """Close the chunks of each bank in the lanes of its `closing` (bool `[lane]`, CPU), with the border guard, by which all
    memories of a lane go back together.

    Returns anchor, weights, momentum, and which lanes went back.
    """
    ends, broken = [], overflowed(weights, momentum) if gone is None else gone
    for bank, at in zip(spec.banks, closing, strict=True):
        parts = [part[bank.layers] for part in (anchor, weights, momentum)]
        if spec.static and bank.names != ("main",) and (torch.compiler.is_compiling() or bool(at.any())):
            parts[1:] = spec.put_back(at, *parts)
        ends.append(border_guard(at, parts[0], parts[1], parts[2], broken)[:3])
    anchor, weights, momentum = (sum(parts, ()) for parts in zip(*ends, strict=True))
    return anchor, weights, momentum, broken


def refused(x: Streams, lanes: Tensor, t: int) -> Streams:
    """The inputs with token t of some lanes (bool `[lane]`) refused."""
    at = torch.zeros_like(x.fine)
    at[:, t] = lanes
    acts = ~at[:, None]
    k, v = (torch.where(acts[..., None], u, 0.0) for u in (x.k, x.v))
    momentum = None if x.momentum is None else x.momentum.masked(acts)
    return x._replace(k=k, v=v, momentum=momentum, fine=x.fine & ~at)


@dataclass(frozen=True)
class SelfModifying(TwoEngines[Streams, MemoryState]):
    """The self-modifying memory. `scan(w0, q, k, v)`: q the query, k and v the inputs x of the generators, not keys and values.

    M_k, M_η and M_α read the argument k, M_v reads v; plain use gives the same x twice, a layer with short convolutions two.

    key_dim, value_dim   size per head; equal, as memories answer in the space they are asked in
    network              of the main memory
    others               network of the generators
    bias                 the inner loss
    retention            Decay(), Decay(toward_initial=True): to W_0 in place of 0, see the module, or Full(): α = 1 and no M_α
    rule                 DeltaGradient(): eq. 88; Gradient(): without the erasing factor; with momentum: W ← (…)W + S, where μ
                         is given as `gates.momentum`
    chunk, chunk_others  periods of the main memory and of the generators, from the lane's position 0; None: the same
    read                 "before" (the paper), "after", or "boundary" (eq. 90 as printed: the chunk's start)
    lr_max               η_max. None: 0.5, which keeps the factor along a key in [α − 1, α] at chunk 1 and bounded at any chunk
                         (derived); with a rule that does not erase no more than 1/chunk, of the longer of the two
    average              with momentum, S ← μS − (1 − μ)η∇ℓ; False: S ← μS − η∇ℓ. See the module
    adaptive_q           q_t = norm(M_q(q)), one generator more
    static               of "k", "v" and "q" those that no token moves: their memories answer as they began, slow weights alone
    unit_values          v_t = norm(M_v(x_t)), ours: every memory is then asked where it is trained, at unit norm. Without it
                         M_v is trained to answer M_v(v) at k, and where ‖v‖ > 1 its gain squares from chunk to chunk (derived)

    The state is a `MemoryState`; `split` names the parts of its weights.
    """

    key_dim: int
    value_dim: int
    network: Network = MLP(expansion=4.0, norm=False, last_std=SMALL)
    others: Network = MLP(expansion=1.0, norm=False, last_std=SMALL)
    bias: Bias = L2()
    retention: Retention = Decay()
    rule: Rule = DeltaGradient("with_decay")
    chunk: int = 16
    chunk_others: int | None = None
    read: Read = "before"
    lr_max: float | None = None
    average: bool = True
    adaptive_q: bool = False
    unit_values: bool = False
    static: tuple[str, ...] = ()
    name: str = "self_modifying"
    _state = MemoryState
    _guards_queries = True

    def __post_init__(self) -> None:
        whole_numbers(self.name, key_dim=self.key_dim, value_dim=self.value_dim, chunk=self.chunk)
        if self.chunk_others is not None:
            whole_numbers(self.name, chunk_others=self.chunk_others)
        if self.key_dim != self.value_dim:
            raise ValueError(
                f"{self.name}: key_dim is {self.key_dim} and value_dim {self.value_dim}; expected equal sizes, as every "
                "memory is asked both for keys and for values"
            )
        read_timing(self.name, self.read)
        choice(self.name, "network", self.network, Network, "MLP()")
        choice(self.name, "others", self.others, Network, "MLP()")
        choice(self.name, "bias", self.bias, Bias, "L2()")
        choice(self.name, "retention", self.retention, Retention, "Decay()")
        choice(self.name, "rule", self.rule, Rule, "DeltaGradient()")
        single = self.bias.window == 1 and not reads_threshold(self.bias)
        mapped = not self.retention.linear or isinstance(self.retention, Settled)
        if not single or mapped or per_channel(self.retention):
            raise ValueError(
                f"{self.name}: bias {self.bias!r} with retention {self.retention!r} does not fit; expected a bias of one token "
                "without threshold and a retention whose weights are their own dual, Decay() or Full()"
            )
        if isinstance(self.rule, Directed | Implicit | Leader | Nesterov):
            raise ValueError(
                f"{self.name}: {self.rule!r} maps the momentum of weights, looks ahead or damps the step by the key; expected "
                "a rule that is linear in its gates"
            )
        if not isinstance(self.static, tuple) or any(name not in ("k", "v", "q") for name in self.static):
            raise ValueError(
                f"{self.name}: static is {self.static!r}; expected a tuple of names among 'k', 'v' and 'q'"
            )
        if "q" in self.static and not self.adaptive_q:
            raise ValueError(f"{self.name}: static has 'q', which has no memory: leave it out, or set adaptive_q")
        if self.lr_max is not None:
            numbers(self.name, above=0, lr_max=self.lr_max)
        switches(self.name, average=self.average, adaptive_q=self.adaptive_q, unit_values=self.unit_values)
        for field, network in (("network", self.network), ("others", self.others)):
            if isinstance(network, Matrix) and not (network.identity or network.init_scale):
                raise ValueError(
                    f"{self.name}: {field}={network!r} starts at 0, would generate 0 and so stay 0: use Matrix(identity=True)"
                )
            network.shapes(self.key_dim, self.key_dim)
        # Once now, as torch.compile cannot enter the lock under which they are made.
        _ = self.names, self.shapes, self.gates_used

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """The gates it makes for itself."""
        return ("lr", "retention") if self.retention.decays else ("lr",)

    @cached_property
    def generators(self) -> tuple[str, ...]:
        """Names of the memories that make what the main memory is given."""
        return ("k", "v", *self.gates, *(("q",) if self.adaptive_q else ()))

    @cached_property
    def banks(self) -> tuple[Bank, Bank]:
        """The generators and the main memory. A bank is one level: one period, and its own tensors of the state."""
        depth = self.others.depth
        return (
            Bank(self.generators, self.others, self.chunk_others or self.chunk, slice(0, depth)),
            Bank(("main",), self.network, self.chunk, slice(depth, depth + self.network.depth)),
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each of w0's weights: "k.0", …, "main.1", then a read-out per gate: "lr.weight", "lr.bias", …"""
        weights = [f"{name}.{n}" for bank in self.banks for name in bank.names for n in range(bank.network.depth)]
        return (*weights, *(f"{gate}.{part}" for gate in self.gates for part in ("weight", "bias")))

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each of w0's weights, in the order of `names`."""
        d = self.key_dim
        weights = [shape for bank in self.banks for _ in bank.names for shape in bank.network.shapes(d, d)]
        return (*weights, *(shape for _ in self.gates for shape in ((d, 1), (1, 1))))

    def state_shapes(self, heads: int) -> Shapes:
        d = self.key_dim
        weights = ((len(bank.names), heads, *shape) for bank in self.banks for shape in bank.network.shapes(d, d))
        return Shapes(tuple(weights), self.rule.momentum)

    @property
    def reads_weights(self) -> bool:
        """Gradients read the weights with any bias and network, through the targets."""
        return True

    @property
    def update_period(self) -> int:
        return self.chunk

    @property
    def largest_steps(self) -> tuple[float, ...]:
        """η_max."""
        if self.lr_max is not None:
            return (self.lr_max,)
        return (min(0.5, 1.0 if self.rule.erase != "none" else 1 / max(bank.chunk for bank in self.banks)),)

    @property
    def averages(self) -> bool:
        """Whether gradients enter the momentum with 1 − μ."""
        return self.average and self.rule.momentum

    @property
    def deep(self) -> bool:
        return self.network.depth > 1

    @property
    def period(self) -> int:
        """Tokens between two anchors of the main memory."""
        return self.chunk

    @cached_property
    def gates_used(self) -> frozenset[str]:
        """Names of the gates that are given from outside."""
        return frozenset({"momentum"} if self.rule.momentum else ())

    def split(self, weights: Weights) -> dict[str, Weights]:
        """The state's anchor, weights or momentum by memory: `["k"]` is (W_1, W_2), each `[lane, head, in, out]`."""
        return {
            name: tuple(w[:, number] for w in weights[bank.layers])
            for bank in self.banks
            for number, name in enumerate(bank.names)
        }

    def join(self, memories: dict[str, Weights]) -> Weights:
        """The inverse of `split`."""
        return tuple(
            torch.stack([memories[name][layer] for name in bank.names], -4)
            for bank in self.banks
            for layer in range(bank.network.depth)
        )

    def put_back(self, lanes: Tensor, anchor: Weights, weights: Weights, momentum: Weights) -> list[Weights]:
        """The generators' weights and momentum, those that are `static` at their anchors and at rest in some lanes (bool)."""
        still = torch.tensor([name in self.static for name in self.generators])
        mask = (lanes[:, None] & still).to(anchor[0].device)[..., None, None, None]
        return [
            tuple(torch.where(mask, a, w) for a, w in zip(anchor, weights, strict=True)),
            tuple(torch.where(mask, 0.0, m) for m in momentum),
        ]

    def _live(self, start: MemoryState, state: MemoryState) -> MemoryState:
        """The state with the anchors of `static` memories taken from the slow weights, so that these learn in every call."""
        still = torch.tensor([name in self.static for name in self.generators], device=state.faults.device)
        own = self.banks[0].layers
        anchor = tuple(
            torch.where(still[:, None, None, None], a, b)
            for a, b in zip(start.weights[own], state.anchor[own], strict=True)
        )
        return state._replace(anchor=anchor + state.anchor[own.stop :])

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Initial weights, float32, each `[head, in, out]`, in the order of `names`: k ≈ x, v ≈ x, v̂ ≈ v at first."""
        whole_numbers(self.name, heads=heads)
        d, made = self.key_dim, list[Tensor]()
        for bank in self.banks:
            for _ in bank.names:
                made.extend(bank.network.init(bank.network.shapes(d, d), heads, generator))
        for gate in self.gates:
            made.append(torch.randn(heads, d, 1, generator=generator) * READOUT_STD)
            made.append(torch.full((heads, 1, 1), FIRST_BIAS[gate]))
        return tuple(made)

    def start(self, w0: Sequence[Tensor], lanes: int) -> MemoryState:
        """State of lanes that have read nothing; weights in at least float32."""
        check_start(self, w0, lanes)
        named = dict(zip(self.names, raised(w0), strict=True))
        joined = self.join(
            {
                name: tuple(named[f"{name}.{layer}"] for layer in range(bank.network.depth))
                for bank in self.banks
                for name in bank.names
            }
        )
        weights = tuple(w.expand(lanes, *w.shape) for w in joined)
        return MemoryState.fresh(weights, momentum=self.rule.momentum)

    def _engines(self) -> Engines[MemoryState]:
        from nestling.memory import self_modifying_chunked, self_modifying_reference

        return self_modifying_reference.scan, self_modifying_chunked.scan

    def _check_state(self, state: MemoryState, lanes: int, heads: int) -> None:
        check_state(self.name, state, state.momentum, lanes, heads, self.state_shapes(heads))

    def _prepare(self, call: Call) -> Streams:
        lanes, _, _ = check_call(self, call)
        w0, q, k, v, gates, state, reset, valid = call
        needed = state is None or reset is not None or self.static or toward_initial(self.retention)
        # Read after resets, and where weights return to it.
        start = self.start(w0, lanes) if needed or state is None else state
        state = start if state is None else self._live(start, state) if self.static else state
        dtype = check_precision(state.weights[0].dtype, call)
        gates = gates.map(lambda gate: gate.to(dtype))
        fine, (q, k, v), gates = token_guard((q.to(dtype), k.to(dtype), v.to(dtype)), gates)
        momentum = factor(gates.momentum, gates.log_momentum, dtype)
        if self.rule.momentum and momentum is None:
            momentum = factor(q.new_zeros(q.shape[:3]), None, dtype)
        first = len(w0) - 2 * len(self.gates)
        readout = {
            gate: (w0[first + 2 * n].to(dtype), w0[first + 2 * n + 1].to(dtype)) for n, gate in enumerate(self.gates)
        }
        return Streams(start, state, q, k, v, momentum, readout, fine, reset, valid)

    def describe(self) -> dict[str, str]:
        """The choices in words, with gates used and state size per lane and head."""
        generators, main = self.banks
        numbers = sum(torch.Size(shape).numel() for shape in self.state_shapes(1).weights)
        period = f"{main.chunk} tokens"
        if generators.chunk != main.chunk:
            period += f" (the other memories: {generators.chunk})"
        return {
            "name": self.name,
            "features": "none: the memories make their keys",
            "network": f"{self.network}; {', '.join(generators.names)}: {self.others}"
            + (f"; {', '.join(self.static)} without learning" if self.static else ""),
            "bias": str(self.bias),
            "retention": str(self.retention),
            "rule": str(self.rule),
            "period": period,
            "read": self.read,
            "gates": ", ".join(sorted(self.gates_used)) or "none (makes its own)",
            "state": f"{(3 if self.rule.momentum else 2) * numbers} numbers per lane and head",
        }

    def _example(self, draw: Draw) -> Example:
        """Random unit-norm q, inputs of the generators with norms about 1, and momentum where the rule has it."""
        d = self.key_dim
        q, k, v = draw.unit(d), draw.normal(d) * d**-0.5, draw.normal(d) * d**-0.5
        return q, k, v, Gates(momentum=draw.share()) if self.rule.momentum else Gates()
