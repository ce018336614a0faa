"""The attentional bias: the loss a memory minimizes on (key, value)."""

from nestling.memory.biases.base import Bias
from nestling.memory.biases.dot import DotProduct
from nestling.memory.biases.l2 import L2
from nestling.memory.biases.omega import Omega

__all__ = ["L2", "Bias", "DotProduct", "Omega"]
