"""The update rule: how a memory descends."""

from nestling.memory.rules.base import Erase, Rule
from nestling.memory.rules.delta import DeltaGradient
from nestling.memory.rules.gradient import Gradient
from nestling.memory.rules.momentum import Momentum

__all__ = ["DeltaGradient", "Erase", "Gradient", "Momentum", "Rule"]
