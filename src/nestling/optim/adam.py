"""Adam as the optimal element-wise memory of gradients (Nested Learning, appendix B, eq. 100–105); see `elementwise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nestling.optim.base import GradientMemory, Optimizer, Params, State, blank
from nestling.optim.elementwise import TARGETS, adam


class AdamMemory(Optimizer):
    """The memory that maps gradients to their own root mean square, element by element: Adam.

    lr                η
    betas             shares of M (numerator) and H (denominator) that are kept; 0: the last gradient alone
    eps               ε, outside the root
    target            P: "root" (√H: Adam) or "square" (H: plain momentum)
    bias_correction   means whose weights add up to one, as in `torch.optim.Adam`, which it then equals step by step;
                      False: as the paper derives it, without
    ridge             λ of the memory's objective, in the units of H; 0: its limit, Adam
    weight_decay      λ, decoupled (`torch.optim.AdamW`)

    Its settings recover the classics: betas (0, β) without correction is RMSProp, (0, 0) is SignSGD.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        target: str = "root",
        bias_correction: bool = True,
        ridge: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "target": target,
                "bias_correction": bias_correction,
                "ridge": ridge,
                "weight_decay": weight_decay,
            },
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["target"] not in TARGETS:
            raise ValueError(f"AdamMemory: target is {group['target']!r}; expected one of: {', '.join(TARGETS)}")

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        return {"mean": blank(p), "square": blank(p), "step": 0}

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        return adam(
            grads,
            states,
            group["betas"],
            group["eps"],
            target=group["target"],
            corrected=group["bias_correction"],
            ridge=group["ridge"],
        )

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        return [adam_memory(group["betas"])]


def adam_memory(betas: Sequence[float]) -> GradientMemory:
    """Both moments are one level: they move equally often, and neither needs the other (Nested Learning, appendix B)."""
    return GradientMemory(
        "moments",
        "one number per weight",
        "L2 to the gradients' own root mean square",
        f"decay {betas[0]} and {betas[1]}",
        "the optimum, in closed form",
        tensors=("mean", "square"),
    )
