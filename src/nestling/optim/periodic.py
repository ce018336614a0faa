"""Frequency as a wrapper: any optimizer moves a group of parameters every p steps, by what its gradients have summed to.

    W_{i+1} = W_i − Σ_{t = i−p+1 … i} η f(W; x_t)   if i ≡ 0 mod p,   else W_{i+1} = W_i          (Nested Learning, eq. 71)

A continuum of slow weights: while a group waits its weights stand, and others move, which is what tells this from gradient
accumulation. To the group's optimizer a period is one step: momentum and moments advance with every update of the group, so that
a share β that is kept reaches p/(1−β) steps back (derived). Nothing is ever reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling.optim.base import GradientMemory, Optimizer, loss_of, raised
from nestling.optim.wrapper import Wrapper

PENDING = "pending_gradient"


class Periodic(Wrapper):
    """Runs each group of `optimizer` every `group["every"]` steps (default 1: every step) on its accumulated gradient.

    optimizer    any `torch.optim.Optimizer`; its groups and state stay its own, and are this one's. Use this one from then on
    accumulate   "mean" of the period's gradients, so that a useful lr does not depend on the period, or "sum" (eq. 71)

    A group's clock, `group["waited"]`, counts calls of `step`. A gradient that is not there counts as 0; a group moves at the
    end of its period if any was. The clock and what has been summed are in `state_dict`. A learning rate that changes within a
    period is the one of its last step. `zero_grad` forgets the present gradient alone, not what was summed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, accumulate: str = "mean") -> None:
        if isinstance(optimizer, Wrapper):
            raise TypeError(
                f"Periodic: the optimizer is {type(optimizer).__name__} already; expected the one it wraps "
                "(a schedule goes round it: Scheduled(Periodic(optimizer), …))"
            )
        if accumulate not in ("mean", "sum"):
            raise ValueError(f"Periodic: accumulate is {accumulate!r}; expected 'mean' or 'sum'")
        super().__init__(optimizer)
        self.accumulate = accumulate
        self.pending: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            _clock(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer; "every" is one more setting."""
        self.optimizer.add_param_group(param_group)
        _clock(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: groups whose period ends move, the others take their gradient in."""
        loss = loss_of(closure)
        groups, due = self.param_groups, []
        for group in groups:
            group["waited"] += 1
            if group["waited"] >= group["every"]:
                due.append(group)
            else:
                self._take_in(group)
        own = [(p, p.grad) for group in due for p in group["params"]]
        try:
            for group in due:
                self._bring(group)
            self.optimizer.param_groups = due
            if due:
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            for p, grad in own:
                p.grad = grad
        for group in due:
            group["waited"] = 0
            for p in group["params"]:
                self.pending.pop(p, None)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with what has been summed as a tensor more of each parameter."""
        found = self.optimizer.state_dict()
        state = dict(found["state"])
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p in self.pending:
                state[number] = {**state.get(number, {}), PENDING: self.pending[p]}
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what `state_dict` returned, or the wrapped optimizer's own: then every period begins, as long as it was."""
        periods = [group["every"] for group in self.param_groups]
        params = [p for group in self.param_groups for p in group["params"]]
        state, pending = {}, {}
        for number, entry in state_dict["state"].items():
            if PENDING in entry:
                pending[params[number]] = entry[PENDING].to(params[number].device, copy=True)
            if rest := {name: value for name, value in entry.items() if name != PENDING}:
                state[number] = rest
        self.optimizer.load_state_dict({**state_dict, "state": state})
        self.pending = pending
        for group, every in zip(self.param_groups, periods, strict=True):
            group.setdefault("every", every)
            _clock(group)

    def memories(self) -> list[GradientMemory]:
        """Those of the wrapped optimizer, for every frequency that a group has."""
        found = []
        for every in sorted({group["every"] for group in self.param_groups}):
            for memory in super().memories():
                name = memory.name if every == 1 else f"{memory.name}, every {every} steps"
                found.append(memory._replace(name=name, period=memory.period * every))
        return found

    def _take_in(self, group: dict[str, Any]) -> None:
        """The gradients of a group that waits."""
        for p in group["params"]:
            if p.grad is not None:
                if p in self.pending:
                    self.pending[p].add_(raised(p.grad))
                else:
                    self.pending[p] = raised(p.grad).clone()
        if isinstance(self.optimizer, Optimizer):
            self.optimizer.wait(group)

    def _bring(self, group: dict[str, Any]) -> None:
        """The whole period's gradients, as those of one step."""
        if group["every"] == 1:
            return
        share = 1 / group["every"] if self.accumulate == "mean" else 1.0
        for p in group["params"]:
            total = self.pending.get(p)
            if p.grad is not None:
                total = raised(p.grad) if total is None else total + raised(p.grad)
            p.grad = None if total is None else (total * share).to(p.dtype)


def _clock(group: dict[str, Any]) -> None:
    """Give a group a period and a clock, where it has none."""
    every = group.setdefault("every", 1)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"Periodic: every is {every!r}; expected a whole number of steps, at least 1")
    group.setdefault("waited", 0)
