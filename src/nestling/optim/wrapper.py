"""Behavior round an optimizer: how often it moves, how its learning rate goes. Groups and state stay the wrapped one's own."""

from __future__ import annotations

from typing import Any

import torch

from nestling.optim.base import GradientMemory
from nestling.optim.inventory import memories


class Wrapper(torch.optim.Optimizer):
    """Base of wrappers. What is not overridden is the wrapped optimizer's; `step` is the leaf's.

    optimizer   the wrapped one. Use the wrapper from then on
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        super().__setstate__({})  # hooks of its own; groups and state are the wrapped one's

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what `state_dict` returned."""
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """The wrapped optimizer, and what the leaf has beside it; no hooks."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def memories(self) -> list[GradientMemory]:
        """Those of the wrapped optimizer."""
        return memories(self.optimizer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def core(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside all wrappers."""
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.optimizer
    return optimizer
