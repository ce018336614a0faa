"""The attentional bias: the loss a memory minimizes on (key, value)."""

from nestling.memory.biases.base import Bias, reads_threshold
from nestling.memory.biases.dot import DotProduct
from nestling.memory.biases.huber import Huber
from nestling.memory.biases.insensitive import EpsilonInsensitive
from nestling.memory.biases.kl import KL
from nestling.memory.biases.l2 import L2
from nestling.memory.biases.lp import Lp
from nestling.memory.biases.omega import Omega
from nestling.memory.biases.robust import Robust

__all__ = ["KL", "L2", "Bias", "DotProduct", "EpsilonInsensitive", "Huber", "Lp", "Omega", "Robust", "reads_threshold"]
