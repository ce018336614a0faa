"""Delta momentum: m ← m(αI − η_d gᵀg) − ηPg, a momentum that erases along a gradient before it writes it (Nested Learning,
eq. 48–49). The rows of g are the keys, P the values: the delta rule of `nestling.memory.rules`, on gradients.

Gradient descent on ½‖m gᵀ + P‖² puts an η on the erase term, which the printed rule omits (derived); gᵀg stands on the right (in
the camera-ready on the left, where its dimensions do not fit). As printed, α − ‖g‖² has the gradient's units: it turns negative
for large gradients and does nothing for small ones. Default is the unit gradient ĝ = g/‖g‖, so that the factor stays within
[α − η_d, α].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestling.memory.rules.delta import erasure
from nestling.optim.base import GradientMemory, Params, rows, unit
from nestling.optim.momentum import Preconditioned
from nestling.optim.preconditioners import Preconditioner

FORMS = ("matrix", "elementwise", "printed")


class DeltaMomentum(Preconditioned):
    """Momentum with the delta rule. Update W ← W + m, with η outside the memory.

    lr               η
    momentum         α, share that is kept of what is not erased, [0, 1]
    erase            η_d, share that is erased along the unit gradient, 0 to momentum; 0: heavy-ball momentum
    form             "matrix" m(αI − η_d ĝᵀĝ);  "elementwise" m(α − η_d ĝ²);  "printed" m(αI − gᵀg), which needs gradients
                     of norm below √(1 + α) to be stable, and ignores erase
    preconditioner   P
    weight_decay     λ, decoupled

    Defaults are ours. A vector is one row: it is erased along the gradient's direction.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        erase: float = 0.5,
        *,
        form: str = "matrix",
        preconditioner: Preconditioner | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            preconditioner,
            {"lr": lr, "momentum": momentum, "erase": erase, "form": form, "weight_decay": weight_decay},
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["form"] not in FORMS:
            raise ValueError(f"DeltaMomentum: form is {group['form']!r}; expected one of: {', '.join(FORMS)}")
        if not 0 <= group["erase"] <= group["momentum"] and group["form"] != "printed":
            raise ValueError(
                f"DeltaMomentum: erase is {group['erase']}; expected a share from 0 to momentum ({group['momentum']}), "
                "or what is erased turns its sign"
            )

    def _forget(self, group: Mapping[str, Any], momentum: list[Tensor], grads: list[Tensor]) -> None:
        lost = [self._lost(group, m, g) for m, g in zip(momentum, grads, strict=True)] if self._erases(group) else []
        torch._foreach_mul_(momentum, group["momentum"])
        if lost:
            torch._foreach_sub_(momentum, lost)

    def _erases(self, group: Mapping[str, Any]) -> bool:
        return bool(group["erase"]) or group["form"] == "printed"

    def _lost(self, group: Mapping[str, Any], m: Tensor, g: Tensor) -> Tensor:
        """What m loses along the gradient."""
        if group["form"] == "elementwise":
            share: Tensor = group["erase"] * unit(g)[0].square()
            return share * m
        keys, strength = (g, 1.0) if group["form"] == "printed" else (unit(g)[0], group["erase"])
        k = rows(keys)
        return erasure(k, k @ rows(m).mT, strength).mT.reshape(m.shape)  # (m gᵀ) g: gᵀg is never made

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        return [
            GradientMemory(
                "momentum",
                "a matrix with the gradient's rows for keys",
                f"L2 to {self.preconditioner}",
                f"decay {group['momentum']}",
                f"delta rule, {group['form']}, erasing {group['erase']}",
                tensors=self._tensors,
            )
        ]
