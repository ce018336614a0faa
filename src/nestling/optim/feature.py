"""Momentum with higher-order feature maps: m ← αm − ηPφ(g) (Nested Learning, eq. 51).

m then has φ's dimensions, and the paper does not say how it becomes an update of W. Ours: it is pulled back through φ at the
present gradient, W ← W + J_φ(ĝ)ᵀ m, which for φ = id is heavy-ball momentum itself (derived). Rows of the gradient are
keys of unit norm ĝ, their norms the sizes that are written, so nothing depends on the gradient's units:

    m ← αm − P ‖g‖ φ(ĝ)      update of a row:  −Σ_i αⁱ k'(ĝ·ĝ_i) g_i,      with the kernel k(c) = φ(·)·φ(·) of c = cosine, P = I

so that a polynomial map (k(c) = 1 + c + c²/2, k' = 1 + c) counts past gradients by their likeness with the present one: doubly
where they agree, not at all where they oppose it. The feature maps are those of `nestling.memory.features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.memory.features import Features, Polynomial
from nestling.memory.settings import choice
from nestling.optim.base import GradientMemory, Optimizer, Params, State, refuse_shards, rows
from nestling.optim.preconditioners import Identity, Preconditioner


class FeatureMomentum(Optimizer):
    """Momentum in the features of gradients. All defaults are ours.

    lr             η
    momentum       α, share that is kept, [0, 1]
    features       φ, any map of `nestling.memory.features`. Default: degree 2 of 16 random projections of a row, beside the
                   row itself
    preconditioner P, of what is written, `[out, features.width(in)]`. Default: the identity
    seed           of the map's own parameters, where it has any
    weight_decay   λ, decoupled

    A vector is one row. Keeps `[out, features.width(in)]` numbers for a parameter `[out, in]`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        *,
        features: Features | None = None,
        preconditioner: Preconditioner | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        self.features: Features = Polynomial(2, reduce=16) if features is None else features
        choice("FeatureMomentum", "features", self.features, Features, "Polynomial()")
        self.preconditioner: Preconditioner = Identity() if preconditioner is None else preconditioner
        self.seed = seed
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        for p in group["params"]:
            refuse_shards("FeatureMomentum", p)
            self.features.width(rows(p).shape[1])

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        kind = torch.promote_types(p.dtype, torch.float32)
        count, width = rows(p).shape
        own = self.features.init(width, 1, self._generator(p, self.seed))
        wide = torch.zeros(count, self.features.width(width), dtype=kind, device=p.device)
        made = {f"own{n}": w.to(p.device, kind) for n, w in enumerate(own)}
        return {"momentum": wide, **made, **self.preconditioner.start(wide)}

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        return [self._pulled_back(group, g, state) for g, state in zip(grads, states, strict=True)]

    def _pulled_back(self, group: dict[str, Any], g: Tensor, state: State) -> Tensor:
        u = rows(g)
        largest = u.abs().amax(1, keepdim=True)
        scaled = u / torch.where(largest > 0, largest, 1.0)
        length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        key = (scaled / torch.where(length > 0, length, 1.0)).requires_grad_()
        own = [state[f"own{n}"] for n in range(sum(name.startswith("own") for name in state))]
        with torch.enable_grad():
            phi = self.features.apply(key[None], own)[0]
        momentum: Tensor = state["momentum"]
        written = self.preconditioner.apply(phi.detach() * (length * largest), state)
        momentum.mul_(group["momentum"]).add_(written)
        (found,) = torch.autograd.grad(phi, key, momentum)
        return found.view_as(g)

    def memories(self) -> list[GradientMemory]:
        widths = {rows(p).shape[1] for group in self.param_groups for p in group["params"]}
        own = max(len(self.features.shapes(width)) for width in widths)
        return [
            GradientMemory(
                "momentum",
                f"a matrix on {self.features}",
                "dot product with the gradient"
                + ("" if isinstance(self.preconditioner, Identity) else f", through {self.preconditioner}"),
                f"decay {self.param_groups[0]['momentum']}",
                "gradient descent",
                tensors=(
                    "momentum",
                    *(f"own{n}" for n in range(own)),
                    *self.preconditioner.start(torch.empty(0)),
                ),
            )
        ]
