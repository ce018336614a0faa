"""Delta momentum: m ← m(αI − η_d gᵀg) − ηPg (Nested Learning, eq. 48–49), a momentum that erases along a gradient before it
writes it. The rows of g are the keys, P the values: the delta rule of `nestling.memory.rules`, on gradients.

Gradient descent on ½‖m gᵀ + P‖² puts an η on the erase term, which the printed rule omits (derived); gᵀg stands on the right (in
the camera-ready on the left, where its dimensions do not fit). As printed, α − ‖g‖² has the gradient's units: it turns negative
for large gradients and does nothing for small ones. Default is the unit gradient ĝ = g/‖g‖, so that the factor stays within
[α − η_d, α]:

    matrix        m(αI − η_d ĝᵀĝ)
    elementwise   m(α − η_d ĝ²)
    tokens        m(αI − η_d Σ_t g_tᵀg_t / Σ_t ‖g_t‖²)      g_t = δ_t x_tᵀ, each token's own gradient, of rank one
    proximal      αm(I − η' gᵀg),  η' = η_d/(1 + η_d‖g‖²)   the implicit step on the objective, exact for rank one (derived)
    printed       m(αI − gᵀg)

The gradient of a batch is a sum, in which tokens that disagree cancel; "tokens" erases along the inputs of all of them, weighed
by their errors, and is "matrix" where there is one token (derived).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memory.rules.delta import erasure
from nestling.optim.base import GradientMemory, Params, State, every, rows, unit
from nestling.optim.capture import Seen
from nestling.optim.momentum import Preconditioned
from nestling.optim.preconditioners import Preconditioner
from nestling.optim.watching import Watching

FORMS = ("matrix", "elementwise", "tokens", "proximal", "printed")


class DeltaMomentum(Watching, Preconditioned):
    """Momentum with the delta rule. Update W ← W + m, with η outside the memory.

    lr               η
    momentum         α, share that is kept of what is not erased, [0, 1]
    erase            η_d. Share that is erased along the unit gradient, 0 to momentum; 0: heavy-ball momentum. With "proximal" any
                     number of at least 0, in units of 1/‖g‖²
    form             "matrix", "elementwise", "tokens", "proximal", or "printed", which needs gradients of norm below √(1 + α)
                     to be stable, and ignores erase
    preconditioner   P
    weight_decay     λ, decoupled
    module           whose layers see the tokens; for "tokens" alone. Hooks on its layers note inputs and errors; `remove()`
                     takes them off. What is no weight of a linear, embedding or convolution layer is erased as "matrix"
    strict           as of `DGD`, for "tokens"; False: weights whose tokens are not known are erased as "matrix"

    Defaults are ours. A vector is one row: it is erased along the gradient's direction. Raises TypeError for "tokens" without a
    module: a gradient does not tell the tokens it is of.
    """

    _instead = "form 'matrix'"

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
        module: nn.Module | None = None,
        strict: bool = True,
    ) -> None:
        self.module, self.strict = module, strict
        super().__init__(
            params,
            preconditioner,
            {"lr": lr, "momentum": momentum, "erase": erase, "form": form, "weight_decay": weight_decay},
        )
        if module is not None:
            if all(group["form"] != "tokens" for group in self.param_groups):
                raise ValueError(f"DeltaMomentum: module is given, but form is {form!r}; only 'tokens' reads it")
            self._watch("errors", normalize=False)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        form, erase = group["form"], group["erase"]
        if form not in FORMS:
            raise ValueError(f"DeltaMomentum: form is {form!r}; expected one of: {', '.join(FORMS)}")
        if form == "tokens" and self.module is None:
            raise TypeError(
                "DeltaMomentum: form 'tokens' needs module=…, the nn.Module whose layers see the tokens: a gradient is a sum "
                "over them, which does not tell their inputs"
            )
        if form == "proximal" and not erase >= 0:
            raise ValueError(f"DeltaMomentum: erase is {erase}; expected a number of at least 0")
        if form not in ("proximal", "printed") and not 0 <= erase <= group["momentum"]:
            raise ValueError(
                f"DeltaMomentum: erase is {erase}; expected a share from 0 to momentum ({group['momentum']}), "
                "or what is erased turns its sign"
            )

    def _forget(
        self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        momentum = every(states, "momentum")
        lost = []
        if group["erase"] or group["form"] in (
            "printed",
            "tokens",
        ):  # what was seen of tokens is to be taken, and forgotten
            lost = [self._lost(group, *each) for each in zip(params, momentum, grads, states, strict=True)]
        torch._foreach_mul_(momentum, group["momentum"])
        if lost:
            torch._foreach_sub_(momentum, lost)

    def _lost(self, group: Mapping[str, Any], p: Tensor, m: Tensor, g: Tensor, state: State) -> Tensor:
        """What m loses beside its decay."""
        form, erase = group["form"], group["erase"]
        if form == "tokens" and (seen := self._seen(p, state)) is not None:
            return _along(seen, m).mul_(erase)
        if form == "elementwise":
            share: Tensor = erase * unit(g)[0].square()
            return share * m
        if form == "printed":
            return _along_rows(g, m, 1.0)
        direction, norm = unit(g)
        if form == "proximal":  # α η'‖g‖², where the square of a large norm stays in range
            return _along_rows(direction, m, group["momentum"] * erase / (erase + norm.reciprocal().square()))
        return _along_rows(direction, m, erase)

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


def _along_rows(keys: Tensor, m: Tensor, strength: Tensor | float) -> Tensor:
    """β(m kᵀ)k with the rows of k for keys; kᵀk is never made."""
    k = rows(keys)
    return erasure(k, k @ rows(m).mT, strength).mT.reshape(m.shape)


def _along(seen: Seen, m: Tensor) -> Tensor:
    """m Σ g_tᵀg_t / Σ ‖g_t‖², in the shape of m; an embedding's inputs are its rows' numbers."""
    total, lost = m.new_zeros(()), torch.zeros_like(m)
    if seen.gram is not None:
        parts = m.reshape(seen.gram.shape[0], -1, seen.gram.shape[-1])
        lost += (parts @ seen.gram.to(m.dtype)).reshape(m.shape)
        total += seen.gram.diagonal(dim1=-2, dim2=-1).sum()
    if seen.uses is not None:
        lost += seen.uses[:, None] * m
        total += seen.uses.sum()
    return lost / torch.where(total == 0, 1.0, total)
