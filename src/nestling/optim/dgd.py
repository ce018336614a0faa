"""Delta gradient descent: W ← argmin_W ½‖Wx − u‖² + ‖W − W_t‖²/2η, u = −∇_y L (Nested Learning, eq. 56–57, appendix C).

Where gradient descent is one step on ⟨Wx, ∇_y L⟩, this is the exact step on an L2 loss to a target that the layer makes for
itself: gradient descent that also erases along its own input. In closed form (derived; eq. 57 is the case ‖x‖ = 1):

    W ← W(I − η'xxᵀ) − η'∇_W L,      η' = η/(1 + η‖x‖²)

For N tokens and the mean of their losses, with C = Σ xxᵀ/N (derived):

    exact        W ← (W − ηg)(I + ηκC)⁻¹                  the proximal step itself; stable for every η
    normalized   W ← W − η'(g + κ W Ĉ),  Ĉ of unit inputs x/‖x‖,  η' = η/(1 + κη)          one product more than SGD
    neurips      W ← W(I − κC) − ηg                      as the camera-ready prints it: needs inputs of norm below √2

κ, the coupling, weighs the erasing alone (½κ‖Wx‖² − ⟨Wx, u⟩ in place of ½‖Wx − u‖²): 1 is the paper, 0 is SGD with rate η. As W x
is pulled towards −∇_y L and not towards a minimum of L, even a minimum is not a fixed point for κ > 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memory.rules.delta import proximal
from nestling.optim.base import GradientMemory, Optimizer, Params, State, blank, every, refuse_shards
from nestling.optim.capture import Capture, Seen

FORMS = ("normalized", "exact", "neurips")


class DGD(Optimizer):
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
        self.form, self.reduction, self.strict = form, reduction, strict
        chosen = [p for p in module.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": lr, "coupling": coupling, "momentum": momentum, "weight_decay": weight_decay})
        self.capture = Capture(module, "gram" if form == "exact" else "erased", form == "normalized")
        both = [self.capture.names[w] for w, sides in self.capture.sides.items() if len(sides) > 1]
        if both and form == "exact":
            self.remove()
            raise ValueError(
                f"DGD: {', '.join(both)} is both an embedding and an output layer, whose exact step has no closed form: "
                "choose form='normalized', or untie them"
            )

    def remove(self) -> None:
        """Take the hooks off the module; the optimizer cannot be used any more."""
        self.capture.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the inputs that belong to them."""
        super().zero_grad(set_to_none)
        if hasattr(self, "capture"):
            self.capture.clear()

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.capture.clear()
        return loss

    def wait(self, group: dict[str, Any]) -> None:
        """Keep what the layers have seen for the step that takes all gradients of the period."""
        for p in group["params"]:
            seen = self.capture.seen.pop(p, None)
            if seen is not None:
                state = self._state_of(group, p)
                for name, value in vars(seen).items():
                    if value is not None:
                        state[f"seen_{name}"] = state[f"seen_{name}"] + value if f"seen_{name}" in state else value

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        for p in group["params"]:
            refuse_shards("DGD", p)

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        return {"momentum": blank(p)} if group["momentum"] else {}

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
            self._recall(p, state)
            found.append(self._delta(group, p, g))
        return found

    def _recall(self, p: Tensor, state: State) -> None:
        """Add what was seen while waiting."""
        kept = {name: state.pop(name) for name in list(state) if name.startswith("seen_")}
        if kept:
            seen = self.capture.seen.setdefault(p, Seen())
            for name, value in kept.items():
                now = getattr(seen, name[5:])
                setattr(seen, name[5:], value if now is None else now + value)

    def _delta(self, group: dict[str, Any], p: Tensor, g: Tensor) -> Tensor:
        """(W − W_new)/η."""
        seen = self.capture.seen.get(p)
        if seen is None:
            if p in self.capture.names and self.strict:
                raise RuntimeError(
                    f"DGD: {self.capture.names[p]} has a gradient, but its layer was not called in the passes since the last "
                    "step, so its inputs are not known: call the layer, or give strict=False to move such weights by SGD"
                )
            return g
        lr, coupling = float(group["lr"]), float(group["coupling"])
        if not coupling or not lr:
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
            return (1 - proximal(torch.full_like(uses, strength), uses) * uses)[:, None] * moved
        strength = strength / (max(seen.count, 1) if mean else 1)
        assert seen.gram is not None
        gram = seen.gram.to(moved.dtype)
        system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + strength * gram
        parts = moved.reshape(gram.shape[0], -1, gram.shape[-1])
        solved = torch.cholesky_solve(parts.mT, torch.linalg.cholesky(system))
        return solved.mT.reshape(moved.shape)

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
