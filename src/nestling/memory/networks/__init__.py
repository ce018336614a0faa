"""The map M(k; W): which function the memory is."""

from nestling.memory.networks.base import Linear, Network, Trace
from nestling.memory.networks.gated import GatedMLP
from nestling.memory.networks.matrix import Matrix
from nestling.memory.networks.mlp import MLP
from nestling.memory.networks.vector import Vector

__all__ = ["MLP", "GatedMLP", "Linear", "Matrix", "Network", "Trace", "Vector"]
