"""M3, multi-scale momentum Muon (Nested Learning, §7.2, eq. 75 and algorithm 1): two momenta that move at different periods.

    M¹ ← β₁M¹ + (1−β₁)g            every step:  the fast memory
    V  ← β₂V + (1−β₂)g²            every step
    M² ← β₃M² + (1−β₃)B/f          every f steps, B the sum of the last period's gradients:  the slow memory
    D  = (NS(M¹) + α NS(M²)) / (√V + ε),      W ← W − ηD

A continuum of two levels, head-wise, whose context flow is gradients. Momentum moves first in a period, by gradients of the one
before, and NS(M²) stands through it; in the first period there is no slow part.

The printed algorithm adds β times the NEW gradient to a sum that forgets nothing; its fast memory then has no horizon, and a
loss scaled by c makes steps of 1/c (derived). Default are means ("ema"), V with Adam's correction, and D brought to a
root mean square of 0.2, AdamW's size, whatever the gradients' units ("matched"); "sum" and "printed" keep the letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.optim.base import GradientMemory, Params, State, blank, every
from nestling.optim.elementwise import optimum, remember, remember_squares
from nestling.optim.muon import Matrices, newton_schulz_of
from nestling.optim.orthogonal import QUINTIC, adjustment

RMS = 0.2
MODES = {"accumulate": ("ema", "sum"), "second_moment": ("matched", "printed", "none")}


class M3(Matrices):
    """Multi-scale momentum Muon. The paper gives no values: all defaults are ours.

    lr               η
    momentum         β₁, share of the fast memory that is kept
    second_momentum  β₂, share of V that is kept
    slow_momentum    β₃, share of the slow memory that is kept per period
    slow_weight      α, weight of the slow memory; 0: its fast part alone
    period           f, optimizer steps between two updates of the slow memory; the clock is the group's, and runs on for
                     parameters that have no gradient
    eps              ε, outside the root
    accumulate       "ema" or "sum" (as printed)
    second_moment    "matched", "printed", or "none": two-scale Muon, with the step sizes of `Muon`
    orthogonalize    False: the identity in place of NS
    ns_coefficients, ns_steps, ns_eps, ns_dtype, adjust_lr_fn   as in `Muon`; adjust_lr_fn acts with second_moment="none" alone
    adam_betas, adam_eps, matrix   of what is no matrix, as in `Muon`; sizes agree with "matched", so that one lr serves all
    parts            matrices that each parameter is made of, as in `Muon`
    weight_decay     λ, decoupled

    Keeps five tensors per matrix: M¹, M², B, V and NS(M²).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        momentum: float = 0.95,
        second_momentum: float = 0.99,
        slow_momentum: float = 0.9,
        slow_weight: float = 0.5,
        period: int = 20,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        accumulate: str = "ema",
        second_moment: str = "matched",
        orthogonalize: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str | None = None,
        adjust_lr_fn: str | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        matrix: bool | None = None,
        parts: int = 1,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**settings, "clock": 0})

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not isinstance(group["period"], int) or group["period"] < 1:
            raise ValueError(f"M3: period is {group['period']!r}; expected a whole number of steps, at least 1")
        if not group["slow_weight"] >= 0:
            raise ValueError(f"M3: slow_weight is {group['slow_weight']}; expected a number of at least 0")
        for setting, known in MODES.items():
            if group[setting] not in known:
                raise ValueError(f"M3: {setting} is {group[setting]!r}; expected one of: {', '.join(known)}")

    def _start_matrix(self, group: dict[str, Any], p: Tensor) -> State:
        state: State = {"fast": blank(p), "step": 0}
        if group["slow_weight"]:
            state |= {"slow": blank(p), "pending": blank(p), "direction": blank(p)}
        if group["second_moment"] != "none":
            state["square"] = blank(p)
        return state

    def _lacks(self, group: dict[str, Any], state: State) -> bool:
        if "fast" not in state:
            return False
        return (group["slow_weight"] and "slow" not in state) or (
            group["second_moment"] != "none" and "square" not in state
        )

    def _begin(self, group: dict[str, Any]) -> None:
        if group["clock"] and group["clock"] % group["period"] == 0:
            self._consolidate(group, [s for p in group["params"] if (s := self.state.get(p)) and "slow" in s])
        group["clock"] += 1

    def _consolidate(self, group: dict[str, Any], states: list[State]) -> None:
        """A period has ended: the slow memory takes in its gradients."""
        if not states:
            return
        slow, pending = every(states, "slow"), every(states, "pending")
        if group["accumulate"] == "sum":
            torch._foreach_add_(slow, pending, alpha=1 - group["slow_momentum"])
        else:
            torch._foreach_div_(pending, float(group["period"]))
            remember(slow, pending, group["slow_momentum"])
        torch._foreach_zero_(pending)
        for state, made in zip(states, self._output(group, slow), strict=True):
            state["direction"].copy_(made)

    def _output(self, group: dict[str, Any], memory: list[Tensor]) -> list[Tensor]:
        return newton_schulz_of({**group, "eps": group["ns_eps"]}, memory) if group["orthogonalize"] else memory

    def _matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        fast, summed = every(states, "fast"), group["accumulate"] == "sum"
        if summed:
            torch._foreach_add_(fast, grads, alpha=1 - group["momentum"])
        else:
            remember(fast, grads, group["momentum"])
        for state in states:
            state["step"] += 1
        made = self._output(group, fast)
        if group["slow_weight"]:
            torch._foreach_add_(every(states, "pending"), grads)
            made = list(torch._foreach_add(made, every(states, "direction"), alpha=group["slow_weight"]))
        elif not group["orthogonalize"]:
            made = [x.clone() for x in made]
        if group["second_moment"] == "none":
            torch._foreach_mul_(made, [adjustment(group["adjust_lr_fn"], p, group["parts"]) for p in params])
            return made
        share, square = group["second_momentum"], every(states, "square")
        if summed:
            torch._foreach_addcmul_(square, grads, grads, value=1 - share)
        else:
            remember_squares(square, grads, share)
        if group["second_moment"] == "printed":
            return list(optimum(made, square, "root", group["eps"]))
        if not summed:
            square = list(torch._foreach_div(square, [1 - share ** state["step"] for state in states]))
        made = list(optimum(made, square, "root", group["eps"]))
        torch._foreach_mul_(made, [matched(x) for x in made])
        return made

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        newton = f"gradient descent, read through {group['ns_steps']} Newton–Schulz steps"
        found = [
            GradientMemory(
                "fast momentum",
                "a matrix without keys",
                "dot product with the gradient",
                "everything" if group["accumulate"] == "sum" else f"decay {group['momentum']}",
                newton,
                tensors=("fast", "square"),
            )
        ]
        if group["slow_weight"]:
            found.append(
                GradientMemory(
                    "slow momentum",
                    "a matrix without keys",
                    "dot product with a period's gradients",
                    "everything" if group["accumulate"] == "sum" else f"decay {group['slow_momentum']} a period",
                    newton,
                    period=group["period"],
                    tensors=("slow", "pending", "direction"),
                )
            )
        return found + self._others()


def matched(x: Tensor) -> Tensor:
    """The factor that brings x to the root mean square of AdamW's steps; 0 for x = 0."""
    size = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    return torch.where(size > 0, RMS / torch.where(size > 0, size, 1.0), size)
