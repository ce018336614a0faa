"""The update rule: how a memory descends."""

from nestling.memory.rules.base import Directed, Erase, Rule
from nestling.memory.rules.delta import DeltaGradient
from nestling.memory.rules.gradient import Gradient
from nestling.memory.rules.implicit import Implicit
from nestling.memory.rules.leader import Leader
from nestling.memory.rules.momentum import Momentum
from nestling.memory.rules.muon import Muon
from nestling.memory.rules.nesterov import Nesterov

__all__ = [
    "DeltaGradient",
    "Directed",
    "Erase",
    "Gradient",
    "Implicit",
    "Leader",
    "Momentum",
    "Muon",
    "Nesterov",
    "Rule",
]
