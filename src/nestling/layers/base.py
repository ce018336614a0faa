"""What every layer answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor, nn

from nestling.layers.level import Level
from nestling.memory import Report


class Layer(nn.Module, ABC):
    """A map of a stretch of tokens that carries a state per lane. Nothing in it depends on `training`."""

    growth: Literal["constant", "linear"] = "constant"
    """Whether the state grows with the tokens read."""

    @abstractmethod
    def start(self, lanes: int) -> Any:
        """State of lanes that have read nothing, from the live slow weights."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        """x `[lane, time, dim]` → y of the same shape, new state. reset, valid: bool `[lane, time]`, as in the model."""

    @abstractmethod
    def levels(self) -> list[Level]:
        """The levels whose state this layer carries."""

    def own(self, *others: str) -> tuple[str, ...]:
        """Names of its slow parameters, but for `others` and what is inside of them."""
        return tuple(
            name
            for name, _ in self.named_parameters()
            if not any(name == other or name.startswith(f"{other}.") for other in others)
        )
