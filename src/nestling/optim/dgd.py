"""Delta gradient descent: W ← argmin_W ½‖Wx − u‖² + ‖W − W_t‖²/2η, u = −∇_y L (Nested Learning, eq. 56–57, appendix C).

Gradient descent is one step on ⟨Wx, ∇_y L⟩: a layer that remembers the errors of its inputs (eq. 29–31). This is the exact step
on an L2 loss to a target that the layer makes for itself: gradient descent that also erases along its own input. Of generalized
gradient descent, any loss L̃(x, u) beside what keeps W near its past (eq. 59–60), both are cases.

In closed form (derived; eq. 57 is the case ‖x‖ = 1):

    W ← W(I − η'xxᵀ) − η'∇_W L,      η' = η/(1 + η‖x‖²)

For N tokens and the mean of their losses, with C = Σ xxᵀ/N (derived):

    exact        W ← (W − ηg)(I + ηκC)⁻¹                  the proximal step itself; stable along every input, for every η
    normalized   W ← W − η'(g + κ W Ĉ),  Ĉ of unit inputs x/‖x‖,  η' = η/(1 + κη)          one product more than SGD
    neurips      W ← W(I − κC) − ηg                      as the camera-ready prints it: needs inputs of norm below √2

κ, the coupling, weighs the erasing alone (½κ‖Wx‖² − ⟨Wx, u⟩ in place of ½‖Wx − u‖²): 1 is the paper, 0 is SGD with rate η. As W x
is pulled towards −∇_y L and not towards a minimum of L, even a minimum is not a fixed point for κ > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memory.rules.delta import proximal
from nestling.optim.base import GradientMemory, Params, State, blank, every
from nestling.optim.capture import Seen
from nestling.optim.watching import Watching

FORMS = ("normalized", "exact", "neurips")


class DGD(Watching):
    """Delta gradient descent on the linear, embedding and convolution layers of a module; SGD on its other parameters.

    module         whose parameters are trained. Hooks on its layers note their inputs; `remove()` takes them off
    lr             η
    form           "normalized", "exact" or "neurips"
    coupling       κ in [0, 1], strength of the erasing beside the step
    momentum       share of past gradients that is kept, m ← αm + g in place of g; 0: none (the paper's)
    reduction      how the loss weighs tokens: "mean" (of all tokens between two steps) or "sum", which makes C a sum
    params         groups of the module's parameters, where they are to have settings of their own; default: one of all
    weight_decay   λ, decoupled, beside the erasing
    strict         raise RuntimeError for a layer's weight that has a gradient without its layer having been called, as of
                   modules that use their weights directly. False: such weights get SGD

    Biases are erased nowhere. A weight that is both embedding and output layer is erased along both, but not in form "exact",
    which has no closed form then (ValueError). Call `zero_grad` of the optimizer, or step, to forget what was seen.

    Raises TypeError for parameters without their module: the rule needs inputs, which a gradient alone does not have. And for
    sharded parameters, as the sums over inputs are of whole rows.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-2,
        *,
        form: str = "normalized",
        coupling: float = 1.0,
        momentum: float = 0.0,
        reduction: str = "mean",
        params: Params | None = None,
        weight_decay: float = 0.0,
        strict: bool = True,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"DGD(module, …) got {type(module).__name__}; expected the nn.Module itself. Delta gradient descent erases "
                "along the inputs of every layer, which a list of parameters does not know: without them it would be SGD"
            )
        if form not in FORMS:
            raise ValueError(f"DGD: form is {form!r}; expected one of: {', '.join(FORMS)}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"DGD: reduction is {reduction!r}; expected 'mean' or 'sum'")
        self.form, self.reduction, self.strict, self.module = form, reduction, strict, module
        chosen = [p for p in module.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": lr, "coupling": coupling, "momentum": momentum, "weight_decay": weight_decay})
        self._watch("gram" if form == "exact" else "erased", form == "normalized")
        assert self.capture is not None
        mine = {p for group in self.param_groups for p in group["params"]}
        both = [self.capture.names[w] for w, sides in self.capture.sides.items() if len(sides) > 1 and w in mine]
        if both and form == "exact":
            self.remove()
            raise ValueError(
                f"DGD: {', '.join(both)} is both an embedding and an output layer, whose exact step has no closed form: "
                "choose form='normalized', or untie them"
            )

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        return {"momentum": blank(p)} if group["momentum"] else {}

    def _lacks(self, group: dict[str, Any], state: State) -> bool:
        return bool(group["momentum"]) and "momentum" not in state

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        if group["momentum"]:
            momentum = every(states, "momentum")
            torch._foreach_mul_(momentum, group["momentum"])
            torch._foreach_add_(momentum, grads)
            grads = momentum
        found = []
        for p, g, state in zip(params, grads, states, strict=True):
            found.append(self._delta(group, p, g, self._seen(p, state)))
        return found

    def _delta(self, group: dict[str, Any], p: Tensor, g: Tensor, seen: Seen | None) -> Tensor:
        """(W − W_new)/η."""
        lr, coupling = float(group["lr"]), float(group["coupling"])
        if seen is None or not coupling or not lr:
            return g
        weight = p.to(g.dtype)
        mean = self.reduction == "mean"
        if self.form == "exact":
            return (weight - self._exact(weight - lr * g, seen, lr * coupling)) / lr
        lost = torch.zeros_like(g)
        if seen.erased is not None:
            lost.add_(seen.erased, alpha=coupling / (max(seen.count, 1) if mean else 1))
        if seen.uses is not None:
            lost += (seen.uses * (coupling / (max(seen.used, 1) if mean else 1)))[:, None] * weight
        return g + lost / lr if self.form == "neurips" else (g + lost) / (1 + coupling * lr)

    def _exact(self, moved: Tensor, seen: Seen, strength: float) -> Tensor:
        """moved (I + strength C)⁻¹."""
        mean = self.reduction == "mean"
        if seen.uses is not None:  # one-hot inputs: the matrix is diagonal, and acts on the rows
            uses = seen.uses / (max(seen.used, 1) if mean else 1)
            return (proximal(torch.full_like(uses, strength), uses) / strength)[:, None] * moved
        strength = strength / (max(seen.count, 1) if mean else 1)
        assert seen.gram is not None
        gram = seen.gram.to(moved.dtype)
        system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + strength * gram
        parts = moved.reshape(gram.shape[0], -1, gram.shape[-1])
        factor, failed = torch.linalg.cholesky_ex(system)
        hidden = system.diagonal(dim1=-2, dim2=-1).amax() * torch.finfo(gram.dtype).eps > 1e-3
        if not (failed.any() or hidden):
            solved = torch.cholesky_solve(parts.mT, factor).mT
        elif not gram.isfinite().all():
            solved = torch.full_like(parts, torch.nan)
        else:  # a product so large that its rounding would hide the 1
            values, vectors = torch.linalg.eigh(gram.double())
            kept = 1 / (1 + strength * values.clamp_min(0))
            solved = ((parts.double() @ vectors * kept[:, None]) @ vectors.mT).to(moved.dtype)
        return solved.reshape(moved.shape)

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        if not group["momentum"]:
            return []
        return [
            GradientMemory(
                "momentum",
                "a matrix without keys",
                "dot product with the gradient",
                f"decay {group['momentum']}",
                "gradient descent",
                tensors=("momentum",),
            )
        ]
