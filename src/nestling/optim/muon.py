"""Muon: W ← W − η s NS(m), m ← βm + (1 − β)g (Nested Learning, eq. 42; K. Jordan's Muon).

A linear momentum memory read through a non-linear output (eq. 52): Newton–Schulz, itself an inner loop that descends on
‖OᵀO − I‖² (eq. 43). NS knows no scale, so the step size stands outside it, where eq. 42 has none (derived).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.memory.newton_schulz import coefficients_of
from nestling.optim.adam import adam_memory
from nestling.optim.base import GradientMemory, Optimizer, Params, State, blank, every
from nestling.optim.elementwise import adam, remember
from nestling.optim.orthogonal import QUINTIC, adjustment, orthogonalized

DTYPES = (None, "bfloat16", "float32", "float64")


class Matrices(Optimizer):
    """Base of optimizers for hidden matrices: what is no matrix, or is not to be taken for one, gets Adam.

    The setting "matrix" of a group says how its parameters are taken: None (default): those of two dimensions and more as
    matrices `[out, everything else]`, the others not; False: none of them, which embeddings and output heads should be (common
    practice; the paper is silent). The setting "parts" says of how many matrices, one above the other, each of them is made
    (default 1; 3 for queries, keys and values in one weight): NS is taken of each. `nestling.optim.split` makes the groups of a
    model.
    """

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        coefficients_of(tuple(group["ns_coefficients"]))
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(f"{type(self).__name__}: ns_steps is {group['ns_steps']}; expected 0 to 99")
        adjustment(group["adjust_lr_fn"], torch.empty(1, 1, device="meta"))
        if group["ns_dtype"] not in DTYPES:
            raise ValueError(
                f"{type(self).__name__}: ns_dtype is {group['ns_dtype']!r}; expected None or one of: "
                f"{', '.join(map(str, DTYPES[1:]))} (in float16 the squares of small singular values vanish)"
            )
        parts = group["parts"]
        if not isinstance(parts, int) or parts < 1 or any(takes(group, p) and len(p) % parts for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__}: parts is {parts!r}; expected a whole number that divides the rows of every matrix"
            )
        if group["matrix"] and any(p.dim() < 2 for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__}: a group with matrix=True has a parameter of fewer than 2 dimensions: "
                "put it in a group with matrix=False"
            )

    def _start(self, group: dict[str, Any], p: Tensor) -> State:
        if takes(group, p):
            return self._start_matrix(group, p)
        return {"mean": blank(p), "square": blank(p), "step": 0}

    @abstractmethod
    def _start_matrix(self, group: dict[str, Any], p: Tensor) -> State:
        """`_start` of what is taken as a matrix."""

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        chosen = [takes(group, p) for p in params]
        made: dict[int, Tensor] = {}
        for matrix in (True, False):
            here = [i for i, c in enumerate(chosen) if c == matrix]
            if not here:
                continue
            g, s = [grads[i] for i in here], [states[i] for i in here]
            found = (
                self._matrices(group, [params[i] for i in here], g, s)
                if matrix
                else adam(g, s, group["adam_betas"], group["adam_eps"])
            )
            made.update(zip(here, found, strict=True))
        return [made[i] for i in range(len(params))]

    @abstractmethod
    def _matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        """`_directions` of what is taken as a matrix."""

    def _others(self) -> list[GradientMemory]:
        """The memory of what is no matrix, if there is any such."""
        group = next((g for g in self.param_groups if not all(takes(g, p) for p in g["params"])), None)
        return [] if group is None else [adam_memory(group["adam_betas"])._replace(name="moments of the rest")]


class Muon(Matrices):
    """Muon, with the settings and defaults of `torch.optim.Muon`; what is no matrix gets Adam, where that one raises.

    lr                η
    weight_decay      λ, decoupled
    momentum          β, share of m that is kept
    nesterov          read (1 − β)g + βm in place of m
    ns_coefficients   a, b, c of the iteration
    eps               a gradient of a smaller norm has no direction
    ns_steps          iterations
    adjust_lr_fn      "original" (None), "match_rms_adamw" or "none": see `orthogonal.adjustment`
    ns_dtype          of the iterations, by name; None: bfloat16 on an accelerator (where `torch.optim.Muon` always has it),
                      at least float32 on a CPU
    adam_betas, adam_eps, matrix   of what is no matrix; its lr and weight_decay are the group's, so give those parameters a
                      group of their own with "original", whose steps are larger than Adam's
    parts             matrices that each parameter is made of
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: str | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        matrix: bool | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "ns_dtype": ns_dtype,
                "adam_betas": adam_betas,
                "adam_eps": adam_eps,
                "matrix": matrix,
                "parts": parts,
            },
        )

    def _start_matrix(self, group: dict[str, Any], p: Tensor) -> State:
        return {"momentum": blank(p)}

    def _matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> list[Tensor]:
        momentum = every(states, "momentum")
        remember(momentum, grads, group["momentum"])
        read = torch._foreach_lerp(grads, momentum, group["momentum"]) if group["nesterov"] else momentum
        made = newton_schulz_of(group, read)
        torch._foreach_mul_(made, [adjustment(group["adjust_lr_fn"], p, group["parts"]) for p in params])
        return made

    def memories(self) -> list[GradientMemory]:
        group = self.param_groups[0]
        return [
            GradientMemory(
                "momentum",
                "a matrix without keys",
                "dot product with the gradient",
                f"decay {group['momentum']}",
                f"gradient descent, read through {group['ns_steps']} Newton–Schulz steps",
                tensors=("momentum",),
            ),
            *self._others(),
        ]


def takes(group: Mapping[str, Any], p: Tensor) -> bool:
    """Whether a parameter of the group is taken as a matrix."""
    return p.dim() > 1 if group["matrix"] is None else bool(group["matrix"])


def newton_schulz_of(group: Mapping[str, Any], matrices: Sequence[Tensor]) -> list[Tensor]:
    """NS with the settings of a group."""
    dtype = None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"])
    return orthogonalized(
        matrices, group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"], dtype, group["parts"]
    )
