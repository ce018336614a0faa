"""AdaGrad as the optimal memory of gradients (Nested Learning, eq. 106–111).

    min_m Σ_i ‖m g_i − P‖² + λ‖m‖²   ⇒   m* = P (Σ g_iᵀ)(H + λI)⁻¹,   H = Σ g gᵀ                    (derived; eq. 106)
    P ∝ H^{1/2},  λ → 0              ⇒   W ← W − η H^{−1/2} M                                                 (eq. 111)

M is the gradient, or with momentum its mean. H in full has the square of the parameter's size; its diagonal is AdaGrad. Between
the two, "rows" takes the columns of a matrix `[m, n]` for vectors of one H `[m, m]`: one side of Shampoo (the paper names
Kronecker approximations and gives none). For a vector that is the full matrix, and eq. 111 itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.optim.base import GradientMemory, Optimizer, Params, State, blank, every
from nestling.optim.elementwise import optimum, remember

FORMS = ("diagonal", "rows")


class AdaGradMemory(Optimizer):
    """The memory that maps gradients to the root of the sum of their squares: AdaGrad, with momentum where asked for.

    lr             η
    eps            added to √H, or to the roots of H's eigenvalues
    ridge          λ of the memory's objective, in the units of H; 0: its limit, AdaGrad
    momentum       share of M that is kept; 0, the default: the gradient itself, AdaGrad
    form           "diagonal" (equals `torch.optim.Adagrad`) or "rows" (H `[m, m]` of matrices `[m, …]`, one eigenvalue
                   decomposition per step and parameter; `[n, n]` of a vector)
    weight_decay   λ, decoupled
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        eps: float = 1e-10,
        *,
        momentum: float = 0.0,
        form: str = "diagonal",
        ridge: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "momentum": momentum, "form": form, "ridge": ridge, "weight_decay": weight_decay},
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["form"] not in FORMS:
            raise ValueError(f"AdaGradMemory: form is {group['form']!r}; expected one of: {', '.join(FORMS)}")

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        square = blank(p)
        if group["form"] == "rows":
            size = columns(p).shape[0]
            square = square.new_zeros(size, size)
        return {"mean": blank(p), "square": square} if group["momentum"] else {"square": square}

    def _lacks(self, group: dict[str, Any], state: State) -> bool:
        return bool(group["momentum"]) and "mean" not in state

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        square, numerator = every(states, "square"), grads
        if group["momentum"]:
            numerator = every(states, "mean")
            remember(numerator, grads, group["momentum"])
        if group["form"] == "diagonal":
            torch._foreach_addcmul_(square, grads, grads)
            return list(optimum(numerator, square, "root", group["eps"], group["ridge"]))
        found = []
        for g, h, m in zip(grads, square, numerator, strict=True):
            h.addmm_(columns(g), columns(g).mT)
            if not h.isfinite().all():  # too large for its square: as g/√∞ of the diagonal form, no step
                found.append(g * 0)
                continue
            values, vectors = torch.linalg.eigh(h)
            root = values.clamp_min(0).sqrt()
            # A direction that no gradient has had is none that M has.
            scale = torch.where(root > root.amax() * 1e-6, 1 / (root + group["ridge"] / root + group["eps"]), 0.0)
            found.append((vectors @ (scale[:, None] * (vectors.mT @ columns(m)))).view_as(g))
        return found

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        return [
            GradientMemory(
                "moments",
                "one number per weight" if group["form"] == "diagonal" else "a matrix over the rows",
                "L2 to the root of the sum of the gradients' squares",
                "everything" + (f"; momentum decays by {group['momentum']}" if group["momentum"] else ""),
                "the optimum, in closed form",
                tensors=("mean", "square"),
            )
        ]


def columns(x: Tensor) -> Tensor:
    """A parameter as vectors in columns: a vector is one of them."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
