"""Trellis: keys and values compressed into two caches of m slots, each by a step of online regression a token (Trellis, §3.2).

    α_t = code of token t                                target of both passes (eq. 4)
    u_t = J_φ(z)ᵀ(φ(z) − α_t),   z = x_t M_{t−1}         ½‖φ(z) − α_t‖² (eq. 6, its factor 2 taken into γ)
    M_t = β_t M_{t−1} − γ_t x_tᵀ u_t                     (eq. 8)

    ŷ_t = q_t M_K                 first pass: M_K learns k ↦ α (eq. 9, 13)
    y_t = φ(f(ŷ_t) M_Vᵀ)          second pass: M_V learns v ↦ α, and is read backwards (eq. 14)

Rows: M_K `[key_dim, slot]`, M_V `[value_dim, slot]`. In chunks u is taken at the states of the chunk's start (eq. 9–11; eq. 12
is printed with the state of its end in the read-out, where eq. 10 unrolled has that of its start), so that with chunk 1 this is
the recurrence above.

Without a prediction (u = −α) it is a pair of bounded caches, K ← diag(g) K + αᵀk and V likewise, read by V^T f(K q): ABC for
g = 1, and GSA for a g of each slot with α = 1 − g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nestling.memory import fused
from nestling.memory.compression import BETWEEN, PHI, between, compress, pulled_back
from nestling.memory.gates import Factor
from nestling.memory.settings import switches, whole_numbers
from nestling.memory.slots import Moved, SlotMemory, Tile, harmless, normalized, orthonormal, rows_of, sound_rows
from nestling.memory.state import Weights
from nestling.memory.tile import only, sound

ValueNorm = Literal["l2", "rms", "none"]
Gating = Literal["shared", "separate", "slots"]
Code = Literal["l2", "rms", "softmax", "none", "complement"]
Objective = Literal["l2", "dot"]


@dataclass(frozen=True)
class Trellis(SlotMemory):
    """Two compression layers in a row. Its w0: M_K,0 and M_V,0, then W_α `[head, key_dim + value_dim, slot]`, which makes the
    code of a token's key and value side by side (ours: the paper projects the layer's input. A code of the key alone would be
    a linear map of what the first pass is given, and nothing would be left to learn).

    phi         φ, which the paper does not name: "silu" (ours), "tanh", "l2", "ln", "softmax" or "identity"
    between     f between the passes: "ln_silu" (the best row of the paper's ablation), "l2_silu", "softmax" or "identity"
    value_read_phi  φ on the answer, as the text after eq. 14 has it
    code        what is made of the projected code: "l2" (ours), "rms", "softmax" or "none";  "complement": without projection,
                what a slot lets go, 1 − β
    value_norm  what the second pass makes of v, which is a key there: "l2" (ours), "rms" or "none"
    gating      "shared": one γ and one β;  "separate": both passes have their own, side by side in the gates' last dimension;
                "slots": a β for each slot, in both passes, `gates.retention` `[lane, head, time, slot]`
    objective   "l2"; "dot": nothing is predicted, u = −J_φᵀα. With phi, value_norm and value_read_phi off and softmax for f this
                is ABC with a softmax code, and GSA with gating="slots" and code="complement"
    initial     M_0: "zero" (ours) or "random", as φ that normalize need

    γ is `gates.lr`, β `gates.retention`. Other defaults are ours as well: 64 slots, chunk 64.
    Raises ValueError for what does not fit together.
    """

    chunk: int = 64
    phi: Literal["identity", "silu", "tanh", "softmax", "l2", "ln"] = "silu"
    between: Literal["ln_silu", "l2_silu", "softmax", "identity"] = "ln_silu"
    value_read_phi: bool = True
    code: Code = "l2"
    value_norm: ValueNorm = "l2"
    gating: Gating = "shared"
    objective: Objective = "l2"
    initial: Literal["zero", "random"] = "zero"
    name: str = "trellis"

    def __post_init__(self) -> None:
        super().__post_init__()
        switches(self.name, value_read_phi=self.value_read_phi)
        for field, known in (
            ("phi", PHI),
            ("between", BETWEEN),
            ("code", get_args(Code)),
            ("value_norm", get_args(ValueNorm)),
            ("gating", get_args(Gating)),
            ("objective", get_args(Objective)),
            ("initial", ("zero", "random")),
        ):
            self.choose(field, known)
        if self.phi in ("l2", "ln") and self.initial == "zero":
            raise ValueError(
                f"{self.name}: phi={self.phi!r} has no derivative at 0, where initial='zero' starts: choose initial='random'"
            )
        if self.phi == "softmax" and self.code != "softmax":
            raise ValueError(
                f"{self.name}: phi='softmax' answers with a distribution over the slots, which code={self.code!r} is not: "
                "choose code='softmax'"
            )
        if self.code == "complement" and not self.per_slot:
            raise ValueError(
                f"{self.name}: code='complement' is what each slot lets go, but gating={self.gating!r} has one retention for "
                "all: choose gating='slots'"
            )
        if self.slots == 1 and (self.phi == "ln" or self.between == "ln_silu"):
            raise ValueError(
                f"{self.name}: the layer norm of a single slot is 0: choose more slots, or other phi and between"
            )

    @property
    def passes(self) -> int:
        return 2 if self.gating == "separate" else 1

    @property
    def per_slot(self) -> bool:
        return self.gating == "slots"

    @property
    def states(self) -> int:
        return 2

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        d, e, m = self.key_dim, self.value_dim, self.slots
        return ((d, m), (e, m)) if self.code == "complement" else ((d, m), (e, m), (d + e, m))

    @property
    def gates_used(self) -> frozenset[str]:
        return frozenset({"lr", "retention"})

    def init(self, heads: int, generator: torch.Generator | None = None) -> Weights:
        """Empty or random states of unit columns, and projections of unit columns."""
        whole_numbers(self.name, heads=heads)
        made = [orthonormal(heads, self.slots, rows, generator).mT.contiguous() for rows, _ in self.shapes]
        if self.initial == "zero":
            made[:2] = [torch.zeros_like(w) for w in made[:2]]
        return tuple(made)

    def tokens(
        self, slow: Weights, q: Tensor, k: Tensor, v: Tensor, retention: Factor | None, fine: Tensor
    ) -> tuple[Weights, Tensor]:
        fine = sound_rows(fine, k) & sound_rows(fine, v)
        if self.code == "complement":
            code = k.new_zeros(*k.shape[:-1], self.slots) if retention is None else retention.complement()
        else:
            projection, d = slow[0], self.key_dim
            code = k @ projection[:, :d] + v @ projection[:, d:]
            fine = sound_rows(fine, code)
            code = harmless(fine, normalized(self.code, harmless(fine, code)))
        return (q, harmless(fine, k), normalized(self.value_norm, harmless(fine, v)), code), fine

    def loss(self, tokens: Weights, weights: Weights) -> Tensor:
        _, k, v, code = tokens
        total = k.new_zeros(())
        for x, w in zip((k, v), weights, strict=True):
            seen = compress(self.phi, x @ w)
            total = total + (0.5 * (seen - code).square() if self.objective == "l2" else -seen * code).sum()
        return total

    def answer(self, tokens: Weights, anchor: Weights, weights: Weights) -> Tensor:
        keys, values = weights
        return self._out(between(self.between, tokens[0] @ keys) @ values.mT)

    def _out(self, y: Tensor) -> Tensor:
        return compress(self.phi, y) if self.value_read_phi else y

    def tile(self, x: Tile) -> Moved:
        """Both passes of a tile (derived). With D the products of β, M_0 before the tile and u at the anchor,

        Ŷ = diag(β…) Q M_K,0 − (D ∘ QKᵀ) diag(γ) U       P = f(Ŷ)
        Y = φ(diag(β…) P M_V,0ᵀ − (D ∘ P (diag(γ) U')ᵀ) V)
        """
        tokens, lr, c, anchor, weights, _ = x
        q, k, v, code = tokens
        predicts = self.objective == "l2"
        rows = tuple(pulled_back(self.phi, x @ w, code, predicts=predicts) for x, w in zip((k, v), anchor, strict=True))
        fine = sound(tuple(u.square() for u in rows)).all(1)
        rows = only(fine[:, None], rows)
        surprise = rows[0].detach().norm(dim=-1)
        sizes = [(x.square().sum(-1) * u.square().sum(-1)).detach() for x, u in zip((k, v), rows, strict=True)]
        first, second = (c[0], c[-1])
        assert first.running is not None
        assert second.running is not None
        u, w = (rate.unsqueeze(-1) * row for rate, row in zip((lr[0], lr[-1]), rows, strict=True))
        size = (sizes[0] + sizes[1]).sqrt()
        if self.per_slot and first.keep is not None:
            return self._slot_by_slot(x, first.keep, first.running, u, w, Moved(q, weights, fine, surprise, size))
        after = (
            fused.advance(weights[0], _last(first.keep), None, None, k, first.running[..., -1, :], u),
            fused.advance(weights[1], _last(second.keep), None, None, v, second.running[..., -1, :], w),
        )
        if self.read == "boundary":
            return Moved(self.answer(tokens, anchor, anchor), after, fine, surprise, size)
        part = rows_of(self.read)
        p = fused.read(q, weights[0], _rows(first.keep, part), None, None, k, first.running[..., part, :], u)
        p = between(self.between, p)
        y = fused.read(p, weights[1].mT, _rows(second.keep, part), None, None, w, second.running[..., part, :], v)
        return Moved(self._out(y), after, fine, surprise, size)

    def _slot_by_slot(self, x: Tile, keep: Tensor, running: Tensor, u: Tensor, w: Tensor, moved: Moved) -> Moved:
        """The same with decays of each slot: β…[t,s] and D[t,i,s] in place of β…[t] and D[t,i], for γ-weighted u and u'."""
        (q, k, v, _), (keys, values) = x.tokens, x.weights
        last = keep[..., -1, None, :]
        after = (
            last * keys - k.mT @ (running[..., -1, :, :] * u),
            last * values - v.mT @ (running[..., -1, :, :] * w),
        )
        if self.read == "boundary":
            return moved._replace(y=self.answer(x.tokens, x.anchor, x.anchor), weights=after)
        part = rows_of(self.read)
        keep, running = keep[..., part, :], running[..., part, :, :]
        p = keep * (q @ keys) - ((q @ k.mT).unsqueeze(-2) @ (running * u.unsqueeze(-3))).squeeze(-2)
        p = between(self.between, p)
        score = ((running * w.unsqueeze(-3)) @ p.unsqueeze(-1)).squeeze(-1)
        return moved._replace(y=self._out((keep * p) @ values.mT - score @ v), weights=after)

    def describe(self) -> dict[str, str]:
        names = {
            "identity": "none",
            "silu": "SiLU",
            "tanh": "tanh",
            "softmax": "softmax",
            "l2": "unit norm",
            "ln": "layer norm",
            "ln_silu": "layer norm of SiLU",
            "l2_silu": "SiLU to unit norm",
        }
        codes = {
            "l2": "of unit norm",
            "rms": "of unit mean square",
            "softmax": "a softmax",
            "none": "as projected",
            "complement": "what each lets go",
        }
        own = {"shared": "", "separate": ", its own for each pass", "slots": ", its own for each slot"}[self.gating]
        return self.described(
            features=f"the key itself; codes over the slots, {codes[self.code]}",
            network=f"caches of keys and of values, {self.slots} slots each, activation {names[self.phi]}, "
            f"between them {names[self.between]}",
            bias="squared error (L2) of the code" if self.objective == "l2" else "dot product with the code",
            retention=f"decay to 0{own}",
            rule="gradient descent",
        )


def _last(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep[..., -1]


def _rows(keep: Tensor | None, rows: slice) -> Tensor | None:
    return None if keep is None else keep[..., rows]
