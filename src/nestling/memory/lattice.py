"""Lattice: m unit slots, each written with what is orthogonal to it (Lattice, abstract; the rest derived or ours, as marked).

    F = φ(S): each slot s_i over its norm n_i        P_i = I − f_iᵀ f_i
    s_i ← μ s_i − γ a_i h P_i                        a_i h P_i: the objective's gradient, by the chain rule through φ

    objective     loss               a_i                  h
    decoding      ½‖kF − v‖²         k_i / n_i            kF − v
    similarity    −⟨kF, v⟩           k_i / n_i            −v
    encoding      ½‖vFᵀ − k‖²        (v f_iᵀ − k_i)/n_i   v

Rows are slots: S `[slot, dim]`, codes k, q `[slot]`, so that y = q φ(S). The abstract says that state slots are written by one
step of online gradient descent, each with the component orthogonal to it, under a gate that depends on state and input. That is
the recurrence above, s_i ← (μ + γ a_i (h f_iᵀ)/n_i) s_i − γ a_i h; the three losses, retraction and gates were not at hand in
the paper's text and are derived from descriptions of it.

A step is orthogonal to its slot, whose norm therefore only grows: ‖s_i‖² by ‖step‖². With `norm="retract"` slots go back to the
unit sphere at every chunk's end, and the rule is Riemannian descent on spheres, each slot turned by tan = γ|a_i|‖hP_i‖.

Inside a chunk a_i, h, f_i and n_i are those of its start S_0, and so is the step. With `form="gate"` the same recurrence is read
as a gated linear attention (derived), whose gates stand at the chunk's start but multiply the running slots,

    s_{i,t} = (μ_t + γ_t a_i (h f_iᵀ)/n_i) s_{i,t−1} − γ_t a_i h

In chunks of one token both are the recurrence above; else they differ by γ a_i (h f_iᵀ)/n_i (s_{i,t−1} − s_{i,0}), which is of
second order in γ. The gate is no decay: it can be more than 1, and 0 or less. Without decay, the part of a slot along f_i stays
n_i in either form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nestling.memory import lattice_chunked
from nestling.memory.gates import Factor
from nestling.memory.settings import whole_numbers
from nestling.memory.slots import (
    CODES,
    Moved,
    SlotMemory,
    Tile,
    harmless,
    normalized,
    orthonormal,
    slot_norms,
    sound_rows,
    unit_slots,
)
from nestling.memory.state import Weights

Objective = Literal["decoding", "similarity", "encoding"]
Norm = Literal["retract", "decay", "free"]
ReadNorm = Literal["token", "chunk", "none"]
Phi = Literal["unit", "identity"]
Form = Literal["stale", "gate"]


@dataclass(frozen=True)
class Lattice(SlotMemory):
    """Slots of values, addressed by codes. Its w0: S_0 `[head, slot, value_dim]`, then the projections W_k and W_q
    `[head, key_dim, slot]` that make codes of keys and queries (ours: the papers project the layer's input).

    objective   what a slot is written for; see the module
    norm        "retract": slots go back to norm 1 at chunk ends, and there is no gate but γ; "decay": the gate μ is
                `gates.retention`; "free": norms grow, and steps turn slots less and less
    read_norm   "token": y = q φ(S_t), each slot by its norm at that token; "chunk": by its norm at the chunk's start, which is
                cheaper; "none": y = q S_t
    code        what is made of the projected k and q: "l2", "rms", "softmax" or "none"
    phi         "unit", or "identity": no norms and no projection, which makes it linear attention (similarity), the delta rule
                (decoding) or the delta rule in the opposite direction (encoding)
    form        what a token does inside a chunk: "stale", the step at the chunk's start; "gate", the gate at the chunk's start on
                the running slots; see the module. Equal with chunk 1, and with phi "identity", which has no gate

    γ is `gates.lr`. Defaults are ours: retract, codes of unit norm, 64 slots, chunk 16; reading after the write.
    Raises ValueError for what does not fit together.
    """

    objective: Objective = "decoding"
    norm: Norm = "retract"
    read_norm: ReadNorm = "token"
    code: Literal["l2", "rms", "softmax", "none"] = "l2"
    phi: Phi = "unit"
    form: Form = "stale"
    name: str = "lattice"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("objective", get_args(Objective))
        self.choose("norm", get_args(Norm))
        self.choose("read_norm", get_args(ReadNorm))
        self.choose("code", CODES)
        self.choose("phi", get_args(Phi))
        self.choose("form", get_args(Form))
        if self.phi == "identity" and (self.norm == "retract" or self.read_norm != "none"):
            raise ValueError(
                f"{self.name}: phi='identity' takes slots with their norms, which norm={self.norm!r} with "
                f"read_norm={self.read_norm!r} takes from them: choose norm='decay' or 'free', and read_norm='none'"
            )

    @property
    def states(self) -> int:
        return 1

    @property
    def slotwise(self) -> bool:
        return self.form == "gate" and self.phi == "unit"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self.slots, self.value_dim), (self.key_dim, self.slots), (self.key_dim, self.slots))

    @property
    def gates_used(self) -> frozenset[str]:
        return frozenset({"lr", "retention"} if self.norm == "decay" else {"lr"})

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Unit slots, orthogonal as far as there is room, as S = 0 has no direction; both projections begin equal."""
        whole_numbers(self.name, heads=heads)
        first = orthonormal(heads, self.slots, self.value_dim, generator)
        if self.phi == "identity":
            first = torch.zeros_like(first)
        codes = orthonormal(heads, self.slots, self.key_dim, generator).mT.contiguous()
        return first, codes, codes.clone()

    def settle(self, weights: Weights) -> Weights:
        return tuple(unit_slots(w) for w in weights) if self.norm == "retract" else weights

    def tokens(
        self, slow: Weights, q: Tensor, k: Tensor, v: Tensor, retention: Factor | None, fine: Tensor
    ) -> tuple[Weights, Tensor]:
        code = k @ slow[0]
        fine = sound_rows(fine, code)
        code = harmless(fine, normalized(self.code, harmless(fine, code)))
        return (normalized(self.code, q @ slow[1]), code, harmless(fine, v)), fine

    def loss(self, tokens: Weights, weights: Weights) -> Tensor:
        return self._loss(tokens, unit_slots(weights[0]) if self.phi == "unit" else weights[0])

    def _loss(self, tokens: Weights, f: Tensor) -> Tensor:
        """At slots as they are read, F."""
        _, k, v = tokens
        if self.objective == "decoding":
            return 0.5 * (k @ f - v).square().sum()
        if self.objective == "similarity":
            return -((k @ f) * v).sum()
        return 0.5 * (v @ f.mT - k).square().sum()

    def written(self, tokens: Weights, anchor: Weights, weights: Weights, gradients: Weights) -> Weights:
        """With gates: G_i = a_i h − (a_i (h f_iᵀ)/n_i) s_i at the running slot, where n_i a_i h is the derivative to f_i."""
        if not self.slotwise:
            return gradients
        n = slot_norms(anchor[0]).unsqueeze(-1)
        f = anchor[0] / n
        (of_f,) = torch.autograd.grad(self._loss(tokens, f), f, create_graph=True)
        step = of_f / n
        return (step - (step * f).sum(-1, keepdim=True) / n * weights[0],)

    def answer(self, tokens: Weights, anchor: Weights, weights: Weights) -> Tensor:
        (w,) = weights
        if self.read_norm == "none":
            return tokens[0] @ w
        norms = slot_norms(w if self.read_norm == "token" else anchor[0])
        return (tokens[0] / norms.unsqueeze(-2)) @ w

    def tile(self, x: Tile) -> Moved:
        return lattice_chunked.tile(self, x.tokens, x.lr[0], x.c[0], x.anchor[0], x.weights[0], x.begins)

    def describe(self) -> dict[str, str]:
        losses = {
            "decoding": "squared error of the decoded value",
            "similarity": "similarity of the decoded value",
            "encoding": "squared error of the encoded code",
        }
        kept = {"retract": "slots back to the unit sphere at chunk ends", "decay": "decay to 0", "free": "everything"}
        codes = {"l2": "of unit norm", "rms": "of unit mean square", "softmax": "a softmax", "none": "as projected"}
        return self.described(
            features=f"codes over the slots, {codes[self.code]}",
            network=f"{self.slots} slots, read "
            + {"token": "by direction", "chunk": "by the chunk start's norms", "none": "with their norms"}[
                self.read_norm
            ],
            bias=losses[self.objective],
            retention=kept[self.norm],
            rule="gradient descent"
            + (" orthogonal to each slot" if self.phi == "unit" else "")
            + (", as a gate on the running slots" if self.slotwise else ""),
        )
