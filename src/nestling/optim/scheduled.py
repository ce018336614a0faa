"""A learning rate that moves through a run, as a wrapper whose place in the run is part of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nestling.optim.wrapper import Wrapper
from nestling.schedule import Schedule


class Scheduled(Wrapper):
    """Runs `optimizer` with its learning rates times a schedule of the steps taken.

        Scheduled(optimizer, Schedule(shape="trapezoid", warmup=100), total=10_000)

    optimizer   any `torch.optim.Optimizer`, or a `Periodic`
    schedule    a `nestling.optim.Schedule` (warm-up; cosine, trapezoid or constant), or any function from the number of steps
                taken to a multiplier
    total       steps of the run, as a `Schedule` needs them

    `group["lr"]` stays the full rate: the multiplier acts during the step alone, so that the schedulers of PyTorch and the
    `Learner`'s own multiply with it. The steps taken, `group["taken"]`, are in `state_dict`, and a resumed run goes on from where
    it stood. Raises ValueError for a `Schedule` without a total, and TypeError round another `Scheduled`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule | Callable[[int], float], *, total: int | None = None
    ) -> None:
        if isinstance(optimizer, Scheduled):
            raise TypeError("Scheduled: the optimizer is Scheduled already; expected the one it wraps")
        if isinstance(schedule, Schedule) and (total is None or total < 1):
            raise ValueError(f"Scheduled: total is {total}; expected the steps of the run, at least 1")
        super().__init__(optimizer)
        self.schedule, self.total = schedule, total
        for group in self.param_groups:
            group.setdefault("taken", 0)

    @property
    def taken(self) -> int:
        """Steps taken."""
        return int(self.param_groups[0]["taken"])

    @property
    def multiplier(self) -> float:
        """Of the next step's learning rates."""
        if isinstance(self.schedule, Schedule):
            assert self.total is not None
            return self.schedule(self.taken, self.taken / self.total, self.total)
        return self.schedule(self.taken)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer; a new group stands where the others do."""
        taken = self.taken
        super().add_param_group(param_group)
        self.param_groups[-1]["taken"] = taken

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what `state_dict` returned, or the wrapped optimizer's own: then the run begins."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("taken", 0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer with the present rates."""
        scale, groups = self.multiplier, self.param_groups
        full = [group["lr"] for group in groups]
        try:
            for group, lr in zip(groups, full, strict=True):
                group["lr"] = lr * scale
            loss = self.optimizer.step(closure)
        finally:
            for group, lr in zip(groups, full, strict=True):
                group["lr"] = lr
        for group in groups:
            group["taken"] += 1
        return loss
