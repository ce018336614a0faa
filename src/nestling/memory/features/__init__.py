"""The feature map φ: what a key and a query become before the network reads them.

The exponential map φ*(q)·φ*(k) = exp(q·k) (Atlas, eq. 22–23) has infinitely many features: `Exponential` is its kernel, for
memories that keep keys (`KernelMemory`).
"""

from nestling.memory.features.base import Features
from nestling.memory.features.exponential import Exponential
from nestling.memory.features.identity import Identity
from nestling.memory.features.polynomial import Polynomial
from nestling.memory.features.powers import Powers
from nestling.memory.features.sketch import Sketch
from nestling.memory.features.unit import Unit

__all__ = ["Exponential", "Features", "Identity", "Polynomial", "Powers", "Sketch", "Unit"]
